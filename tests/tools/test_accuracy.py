import re
import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
from helpers import import_models
from idx_files import idx, random_arrays
from mmengine.config import Config
from tool_runs import ROOT, run_here, tool

TOOL, INT8 = 'benchmarks/accuracy.py', 'benchmarks/int8.py'
PART = ('--data', 'full', '--networks', 'resnet18', '--lr-factors', 1, '--epochs', 1)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two steps an epoch, on noise."""
    import_models('mmpretrain')
    data = tmp_path / 'data/fashion_mnist'
    data.mkdir(parents=True)
    for name, array in random_arrays(train=300, test=20).items():
        (data / name).write_bytes(idx(array))
    monkeypatch.chdir(tmp_path)
    return tool(TOOL)


@pytest.fixture
def study():
    return tool(TOOL)


@pytest.fixture
def runs(study):
    return sys.modules['accuracy_runs']


@pytest.fixture
def reports(study):
    return sys.modules['accuracy_report']


def rows_of(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict('records')


def write(path, *rows):
    runs = tool(TOOL).runs
    results = tool(TOOL).Results(path, runs.KEY, runs.VALUES)
    results.add(*rows)
    return results.rows


def train(*options):
    run_here(TOOL, *PART, *options)


@pytest.mark.slow
def test_trains_side_by_side(toy, runs, capsys, monkeypatch):
    line = ('--blocks', 'none', 'orepa', '--seeds', 3, '--jobs', 2, '--out', 'out')
    train(*line)
    rows = rows_of('out/results.csv')
    assert {row['block'] for row in rows} == {'none', 'orepa'} and len(rows) == 2
    for row in rows:
        assert (row['lr'], row['seed'], row['device']) == ('0.2', '3', 'cpu')
        assert row['recipe'] == runs.recipe_of(row)
        # Deployed, both are the same network.
        assert row['deployed_parameters'] == rows[0]['deployed_parameters']
        (point,) = runs.curve_of(row)
        assert point.epoch == 1 and f'{point.metric:.2f}' == row['accuracy']
        assert 0 <= point.seconds < float(row['seconds'])
        assert 0 <= point.cpu_seconds < float(row['cpu_seconds'])
        folder = runs.folder_of(row, Path('out/runs'))
        assert Config.fromfile(folder / 'run.py').randomness.seed == 3
        assert len(list(folder.glob('*.pth'))) == 1
    assert matplotlib.image.imread('out/differences.png').ndim == 3
    assert matplotlib.image.imread('out/budget.png').ndim == 3
    assert Path('out/tables.md').read_text() in capsys.readouterr().out

    # What is there stays; an ablation is new; one that fails stops no other.
    broken = runs.Variant('broken', {'model.backbone.depth': 17})
    monkeypatch.setitem(runs.VARIANTS, 'broken', broken)
    variants = ('--variants', 'broken', 'standard', 'kernel_decay')
    with pytest.raises(SystemExit, match=r'^error: 1 jobs failed.*broken.*output.log'):
        train(*line, *variants)
    assert '2 of 4 jobs to do.' in capsys.readouterr().out
    *found, last = rows_of('out/results.csv')
    assert found == rows and last['variant'] == 'kernel_decay'
    cfg = Config.fromfile(runs.folder_of(last, Path('out/runs')) / 'run.py')
    assert cfg.custom_hooks[0].type == 'EquivalentKernelDecayHook'
    assert cfg.optim_wrapper.paramwise_cfg.branch_decay_mult == 0
    assert cfg.optim_wrapper.paramwise_cfg.norm_decay_mult == 0

    # In INT8; what was measured stays.
    line = (INT8, '--study', 'out', '--images', 4, '--jobs', 1, '--out', 'int8')
    run_here(*line)
    measured = rows_of('int8/results.csv')
    assert len(measured) == 3
    for found in measured:
        assert 25 < float(found['kernel_snr']) < 50
        assert 1 <= float(found['outlier']) < 20
    assert matplotlib.image.imread('int8/int8.png').ndim == 3
    run_here(*line)
    assert '0 of 3 jobs to do.' in capsys.readouterr().out
    assert rows_of('int8/results.csv') == measured


def row(block, seed, reached, factor='1', variant='standard', seconds=1.0, **other):
    curve = ' '.join(
        f'{epoch}:{reached - 20 + epoch:.2f}:{9 * seconds * epoch}:{seconds * epoch}'
        for epoch in (1, 10, 20)
    )
    values = dict(
        data='10pct',
        network='resnet18',
        block=block,
        variant=variant,
        lr_factor=factor,
        seed=str(seed),
        epochs='20',
        accuracy=str(reached),
        lr='0.05',
        recipe='0123abcd',
        cpu_seconds='99',
        seconds='99',
        device='cpu',
        deployed_parameters='12345',
        curve=curve,
    )
    return {**values, **other}


ROWS = [
    *(row('none', seed, value) for seed, value in enumerate((80, 82))),
    *(
        row('orepa', seed, value, seconds=1.5)
        for seed, value in enumerate((81, 85, 90))
    ),
    *(row('none', 0, 60, factor) for factor in ('1/3', '3')),
    *(row('orepa', seed, 99, '3') for seed in range(2)),
    row('orepa', 0, 50, '1/3'),
    row('orepa', 0, 80, variant='plain_stem', seconds=3.0),
    row('none', 0, 83, variant='epochs_1.5', epochs='30', seconds=1.5),
    # Of another length, and of another machine.
    row('none', 2, 10, epochs='3'),
    row('none', 0, 90, data='full', epochs='8', device='H100'),
    row('orepa', 0, 91, data='full', epochs='8', device='H200'),
]


@pytest.fixture
def out(study, tmp_path):
    """The rows, in two files."""
    for name, rows in (('a', ROWS[:4]), ('b', ROWS[2:])):
        write(tmp_path / f'{name}.csv', *rows)
    return tmp_path / 'out'


def report(out, *options):
    files = [out.parent / f'{name}.csv' for name in 'ab']
    run_here(TOOL, '--report-only', '--out', out, '--merge', *files, *options)


def test_report(out, reports, capsys):
    """Of the rows of two files, those of one length and of one machine together."""
    path = out.parent / 'page.md'
    with pytest.raises(SystemExit, match='page.md'):
        report(out, '--document', path)
    assert not out.exists()
    names = [f'{name}-{data}' for data in reports.DATA for name in reports.TABLES]
    places = [f'<!-- begin {n} -->\nold\n<!-- end {n} -->' for n in names]
    path.write_text('\n'.join(places))
    for _ in range(2):
        report(out, '--document', path)
    printed = capsys.readouterr().out
    assert 'Left out: 1 rows' in printed and 'no place' not in printed
    assert rows_of(out / 'results.csv') == ROWS
    text = path.read_text()
    assert '| 85.33 ± 4.51 | +2.00 [-10.71, +14.71] (2 pairs) |' in text
    # Times of two devices have no ratio.
    assert '| slim ResNet-18, OREPA | 91.00 | +1.00 |  |  |' in text
    for name in ('differences', 'ablations', 'budget'):
        assert matplotlib.image.imread(out / f'{name}.png').ndim == 3


def test_seconds(runs):
    """Those of a core where there is no GPU, those of the clock where there is."""
    assert runs.training_seconds(ROWS[0]) == 20
    on_gpu = dict(ROWS[0], device='H100')
    assert runs.training_seconds(on_gpu) == 180
    first, *_ = runs.curve_of(on_gpu)
    assert runs.training_seconds(on_gpu, first) == 9


def study_of(reports, tmp_path, *rows):
    return reports.Study(write(tmp_path / 'results.csv', *rows), '10pct')


def test_best_rate_is_that_of_the_same_seeds(reports, tmp_path):
    """More seeds of one rate must not make it look worse, nor a divergence better."""
    means = {'1': (90, 90, 70, 70), '3': (85, 85), '1/3': (95, float('nan'))}
    rows = [
        row('none', seed, value, factor, accuracy=f'{value:.2f}')
        for factor, values in means.items()
        for seed, value in enumerate(values)
    ]
    study = study_of(reports, tmp_path, *rows)
    assert {*study.best('resnet18', 'none').lr_factor} == {'1'}
    table = reports.rates_table(study)
    assert '95.00 (1 diverged), 2 | **80.00 ± 11.55**, 4 | 85.00 ± 0.00, 2 |' in table
    assert study.best('resnet18', 'orepa').empty


def test_bad_input(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, line in (
        ('no rows', (TOOL, '--out', 'new', '--report-only')),
        ('is missing', (TOOL, *PART, '--out', 'new')),
        ('do not go', (TOOL, *PART, '--blocks', 'dbb', '--variants', 'plain_stem')),
        ('gone.csv', (TOOL, '--report-only', '--merge', 'gone.csv')),
        ('no trained networks', (INT8, '--study', tmp_path, '--out', 'new')),
        ('no rows', (INT8, '--report-only', '--out', 'new')),
    ):
        with pytest.raises(SystemExit, match=f'^error: .*{words}'):
            run_here(*line)
    for bad in ('a', '-1', '7-0'):
        with pytest.raises(SystemExit):
            train(f'--seeds={bad}')
    assert not Path('new').exists()


def test_changed_recipe(study, runs, tmp_path, monkeypatch):
    """Rows of two recipes are not taken for those of one."""
    import_models('mmpretrain')
    monkeypatch.chdir(tmp_path)
    found = row('none', 0, 80, data='full', epochs='1', curve='1:80.00:9:9')
    found['recipe'] = runs.recipe_of(found)
    assert found['recipe'] != runs.recipe_of({**found, 'block': 'dbb'})
    assert found['recipe'] == runs.recipe_of({**found, 'seed': '5'})
    write(tmp_path / 'results.csv', found)
    # Without the data: there is nothing left to train.
    line = ('--blocks', 'none', '--seeds', '0', '--out', tmp_path)
    train(*line)
    runs.base_config('full', 'resnet18').optim_wrapper.optimizer.weight_decay = 1.0
    try:
        with pytest.raises(SystemExit, match='error: the configs have changed'):
            train(*line)
    finally:
        runs.base_config.cache_clear()


def test_document_has_the_commands_of_its_rows(study):
    text = (ROOT / 'docs/evidence.md').read_text().replace('\\\n', '')
    named = set()
    for line in re.findall(r'^python tools/benchmarks/accuracy.py (.+)', text, re.M):
        args = study.parse_args(line.split())
        if not args.report_only:
            named |= {tuple(key.values()) for key in study.runs.keys_of(args)}
    rows = pd.read_csv(ROOT / 'docs/evidence/results.csv', dtype=str)
    assert {*rows[list(study.runs.KEY)].itertuples(index=False, name=None)} == named
