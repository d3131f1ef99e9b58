import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from helpers import import_models
from idx_files import idx, random_arrays
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, init_default_scope
from tool_runs import ROOT, command, environment, run_here, tool

TOOL = 'benchmarks/accuracy.py'
ROWS_OF_DOCUMENT = ROOT / 'docs/evidence/results.csv'
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
    assert not Path('out/ablations.png').exists()
    assert Path('out/tables.md').read_text() in capsys.readouterr().out

    # What is there stays; an ablation is new; one that fails stops no other.
    broken = runs.Variant('broken', {'model.backbone.depth': 17})
    monkeypatch.setitem(runs.VARIANTS, 'broken', broken)
    variants = ('--variants', 'broken', 'standard', 'stem_lr_0.1')
    with pytest.raises(SystemExit, match=r'^error: 1 jobs failed.*broken.*output.log'):
        train(*line, *variants)
    assert '2 of 4 jobs to do.' in capsys.readouterr().out
    *found, last = rows_of('out/results.csv')
    assert found == rows and last['variant'] == 'stem_lr_0.1'
    cfg = Config.fromfile(runs.folder_of(last, Path('out/runs')) / 'run.py')
    assert cfg.optim_wrapper.paramwise_cfg.stem_lr_mult == 0.1
    assert cfg.optim_wrapper.paramwise_cfg.norm_decay_mult == 0
    assert Path('out/ablations.png').exists()


def of_session(session):
    """The processes of a session that still run."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            state, _, _, number = path.read_text().rpartition(')')[2].split()[:4]
        except OSError:
            continue
        if int(number) == session and state != 'Z':
            found.append(path)
    return found


WITHOUT = """
import sys

sys.modules.update(mmdet=None, mmseg=None)
"""


@pytest.mark.slow
def test_killed(toy):
    """No training is left behind, and the next run goes on; with mmpretrain alone."""
    Path('blocker').mkdir()
    Path('blocker/sitecustomize.py').write_text(WITHOUT)
    paths = os.pathsep.join([str(ROOT), str(Path('blocker').resolve())])
    line = command(TOOL, *PART, '--blocks', 'none', '--jobs', 2, '--out', 'out')
    with subprocess.Popen(
        [*line, '--seeds', '0-9'],
        env=environment(PYTHONPATH=paths),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            path, deadline = Path('out/results.csv'), time.monotonic() + 200
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            process.kill()
            process.wait()
            deadline = time.monotonic() + 30
            while of_session(process.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not of_session(process.pid)
        finally:
            if of_session(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    before = rows_of(path)
    assert 0 < len(before) < 10
    train(
        '--blocks', 'none', '--jobs', 1, '--out', 'out', '--seeds', f'0-{len(before)}'
    )
    assert rows_of(path)[: len(before)] == before
    assert len(rows_of(path)) == len(before) + 1


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


def test_report(out, study, capsys):
    report(out)
    text = capsys.readouterr().out
    assert "4 rows are new in '" in text and f'{len(ROWS) - 4} rows are new' in text
    assert 'Left out: 1 rows of other numbers of epochs' in text
    assert rows_of(out / 'results.csv') == ROWS
    _, *parts = (out / 'tables.md').read_text().split('### ')
    tables = {name: lines for name, *lines in map(str.splitlines, parts)}
    assert [line for line in tables['main-10pct'] if line][2:] == [
        '| slim ResNet-18, plain | 81.00 ± 1.41 |  | +2.00 [-10.71, +14.71] | 1.00 | '
        '12,345 | 2 |',
        '| slim ResNet-18, OREPA | 85.33 ± 4.51 | +2.00 [-10.71, +14.71] (2 pairs) |  '
        '| 1.50 ± 0.00 | 12,345 | 3 |',
    ]
    assert [line for line in tables['rates-10pct'] if line][2:] == [
        '| slim ResNet-18, plain | 60.00, 1 | **81.00 ± 1.41**, 2 | 60.00, 1 |  |',
        '| slim ResNet-18, OREPA | 50.00, 1 | 85.33 ± 4.51, 3 | **99.00 ± 0.00**, 2 | '
        '+18.00 [+5.29, +30.71] |',
    ]
    assert [line for line in tables['ablations-10pct'] if line][2:] == [
        '| OREPA | 85.33 ± 4.51 |  | +2.00 [-10.71, +14.71] (2 pairs) |  | 3 |',
        '| OREPA, plain stem | 80.00 | -1.00 | +0.00 |  | 1 |',
    ]
    assert [line for line in tables['budget-10pct'] if line][2:] == [
        '| slim ResNet-18, plain, 20 epochs | 81.00 ± 1.41 | 1.00 |  | '
        '+2.00 [-10.71, +14.71] | 2 |',
        '| slim ResNet-18, plain, 30 epochs | 83.00 | 1.50 |  | -2.00 | 1 |',
        '| slim ResNet-18, OREPA, 20 epochs | 85.33 ± 4.51 | 1.50 ± 0.00 | '
        '+2.00 [-10.71, +14.71] (2 pairs) |  | 3 |',
    ]
    # Times of two devices have no ratio.
    assert [line for line in tables['main-full'] if line][2:] == [
        '| slim ResNet-18, plain | 90.00 |  | +1.00 | 1.00 | 12,345 | 1 |',
        '| slim ResNet-18, OREPA | 91.00 | +1.00 |  |  | 12,345 | 1 |',
    ]
    for name in ('differences', 'ablations', 'budget'):
        assert matplotlib.image.imread(out / f'{name}.png').ndim == 3
    # Nothing is new, nothing is lost.
    text = (out / 'tables.md').read_text()
    report(out, '--epochs', 77)
    assert 'No tables yet' in capsys.readouterr().out
    assert rows_of(out / 'results.csv') == ROWS
    assert (out / 'tables.md').read_text() == text


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
    table = reports.markdown_table(reports.rates_rows(study))
    assert '95.00 (1 diverged), 2 | **80.00 ± 11.55**, 4 | 85.00 ± 0.00, 2 |' in table
    assert study.best('resnet18', 'orepa').empty


def test_trainings_that_diverged(reports, tmp_path, capsys):
    """They are counted, and are in no mean and in no curve."""
    plain = [row('none', seed, 80 + seed) for seed in range(3)]
    orepa = [row('orepa', seed, 82 + seed) for seed in range(2)]
    orepa.append(row('orepa', 2, 10, accuracy='nan'))
    study = study_of(reports, tmp_path, *plain, *orepa)
    assert (
        '| slim ResNet-18, OREPA | 82.50 ± 0.71 (1 diverged) | '
        '+2.00 [+2.00, +2.00] (2 pairs) |'
    ) in reports.tables_of([study])['main-10pct']
    run_here(TOOL, '--report-only', '--out', tmp_path)
    assert '82.50 ± 0.71 (1 diverged)' in capsys.readouterr().out


def test_changes_of_each_block(reports, tmp_path):
    rows = [row('none', 0, 80), row('none', 0, 81, variant='strong_decay')]
    rows += [row('dbb', 0, 70), row('dbb', 0, 79, variant='single_init')]
    rows += [row('repvgg', 0, 75, variant='single_init')]  # There is no whole.
    rows += [row('orepa', 0, 90)]
    study = study_of(reports, tmp_path, *rows)
    tables = reports.tables_of([study])
    assert tables['ablations-10pct'].splitlines()[2:] == [
        '| DBB | 70.00 |  | -10.00 | +20.00 | 1 |',
        '| DBB, single_init | 79.00 | +9.00 | -1.00 | +11.00 | 1 |',
    ]
    assert tables['decays-10pct'].splitlines()[2:] == [
        '| plain | 80.00 |  |  | +10.00 | 1 |',
        '| plain, strong weight decay | 81.00 | +1.00 | +1.00 | +9.00 | 1 |',
    ]


def test_document(out, reports, tmp_path, capsys):
    path = tmp_path / 'page.md'
    with pytest.raises(SystemExit, match="error: there is no document '.*page.md'"):
        report(out, '--document', path)
    for bad in ('<!-- begin a -->', '<!-- end a --><!-- begin a -->'):
        path.write_text(bad)
        with pytest.raises(SystemExit, match='error: .* needs one'):
            report(out, '--document', path)
        assert path.read_text() == bad and not out.exists()
    names = [f'{name}-{data}' for data in reports.DATA for name in reports.TABLES]
    names += reports.CAPTIONS
    places = [f'<!-- begin {name} -->\nold\n<!-- end {name} -->' for name in names]
    path.write_text('A\n' + '\nB\n'.join(places) + '\nC\n')
    for _ in range(2):
        report(out, '--document', path)
        text = path.read_text()
        assert text.startswith('A\n<!--') and text.endswith('-->\nC\n')
        assert text.count('| slim ResNet-18, plain | 81.00 ± 1.41 |  |') == 1
        assert text.count('](out/budget.png)') == text.count('(out/ablations.png)') == 1
        # Of rows that are not there, it says what it said.
        assert text.count('\nold\n') == text.count('begin') - 8
    assert 'no place' not in capsys.readouterr().out


def test_document_has_the_commands_of_these_figures(study):
    text = (ROOT / 'docs/evidence.md').read_text().replace('\\\n', '')
    found = set()
    for line in re.findall(r'^python tools/benchmarks/accuracy.py (.+)', text, re.M):
        args = study.parse_args(line.split())
        if not args.report_only:
            found |= {tuple(key.values()) for key in study.runs.keys_of(args)}
    rows = rows_of(ROWS_OF_DOCUMENT)
    assert {tuple(row[name] for name in study.runs.KEY) for row in rows} == found
    assert f'These lines are {len(found)}\ntrainings' in text


def test_stems(reports, tmp_path):
    rows = [row('none', seed, 80 + seed) for seed in range(2)]
    assert not [*reports.stems_rows([study_of(reports, tmp_path / 'a', *rows)])]
    rows += [row('none', 0, 81, variant='orepa_stem', seconds=1.25)]
    rows += [row('orepa', 0, 82, seconds=1.5)]
    study = study_of(reports, tmp_path / 'b', *rows)
    data = '10 % of Fashion-MNIST | 1'
    assert reports.tables_of([study])['stems'].splitlines()[2:] == [
        f'| slim ResNet-18, plain | {data} | 80.50 ± 0.71 |  | +2.00 (1 pair) | 2 |',
        f'| slim ResNet-18, plain, OREPA stem | {data} | 81.00 | +1.00 | +1.00 | 1 |',
        f'| slim ResNet-18, OREPA | {data} | 82.00 | +2.00 |  | 1 |',
    ]


@pytest.mark.parametrize('network', ['resnet18', 'resnet34', 'resnet50'])
def test_other_depths_and_sizes(runs, network):
    import_models('mmpretrain')
    init_default_scope('mmpretrain')
    key = dict(zip(runs.KEY, ('10pct-56px', network, 'none', 'orepa_stem', '1')))
    cfg = sys.modules['trainings'].merged(
        runs.config_of('10pct-56px', network),
        runs.options_of({**key, 'seed': '0', 'epochs': '20'}),
    )
    pipeline = Compose(cfg.train_dataloader.dataset.pipeline)
    packed = pipeline(dict(img=np.zeros((28, 28), np.uint8), gt_label=1))
    assert packed['inputs'].shape == (1, 56, 56)
    model = MODELS.build(cfg.model)
    images = packed['inputs'][None].float().repeat(2, 1, 1, 1)
    assert model(images).shape == (2, 10)
    assert any('branches' in name for name, _ in model.backbone.named_modules())
    assert cfg.model.backbone.depth == int(network.removeprefix('resnet'))


def test_parts(study):
    def count(*options):
        args = study.parse_args(list(map(str, options)))
        return len({tuple(key.values()) for key in study.runs.keys_of(args)})

    assert count('--seeds', 3, '--data', '10pct') == (4 + 3) * 3
    assert count() == (4 + 3) * 3 * 2 * 8
    assert (
        count('--variants', 'epochs_1.5', '--lr-factors', 1, '--seeds', '0-1') == 7 * 4
    )
    ablations = ('--variants', 'ablations', '--lr-factors', '1', '--data', 'full')
    assert count(*ablations, '--seeds', '0-4') == (len(study.runs.ABLATIONS) + 2) * 5
    assert count(*ablations, '--blocks', 'dbb') == 8  # single_init
    assert count(*ablations, '--blocks', 'none') == 0


def test_bad_input(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='error: no rows in .* without --report-only'):
        run_here(TOOL, '--out', 'new', '--report-only')
    with pytest.raises(SystemExit, match='error: the data folder .*fashion_mnist'):
        train('--out', 'new')
    with pytest.raises(SystemExit, match='error: these blocks and variants do not go'):
        train('--blocks', 'dbb', '--variants', 'plain_stem')
    with pytest.raises(SystemExit, match="error: no results at 'gone.csv'"):
        run_here(TOOL, '--report-only', '--merge', 'gone.csv')
    for bad in ('3-', 'a', '-1', '7-0'):
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


INT8 = 'benchmarks/int8.py'


@pytest.mark.slow
def test_int8_of_trained_networks(toy, capsys):
    line = ('--blocks', 'orepa', '--variants', 'kernel_decay', '--seeds', 0)
    train(*line, '--out', 'out')
    (run,) = Path('out/runs').glob('*kernel_decay*')
    cfg = Config.fromfile(run / 'run.py')
    assert cfg.custom_hooks[0].type == 'EquivalentKernelDecayHook'
    assert cfg.optim_wrapper.paramwise_cfg.branch_decay_mult == 0
    line = (INT8, '--study', 'out', '--images', 4, '--jobs', 1, '--out', 'int8')
    run_here(*line)
    (found,) = rows_of('int8/results.csv')
    assert (found['block'], found['variant']) == ('orepa', 'kernel_decay')
    # Of twenty images, one is as good as undecided between PyTorch and ONNX Runtime.
    (trained,) = rows_of('out/results.csv')
    accuracy = float(found['float32'])
    assert accuracy == pytest.approx(float(trained['accuracy']), abs=5.01)
    assert 25 < float(found['kernel_snr']) < 50 and 1 <= float(found['outlier']) < 20
    # Of twenty images of noise.
    assert all(abs(float(found[s]) - accuracy) <= 25 for s in tool(INT8).HEADERS)
    table = Path('int8/tables.md').read_text()
    assert '| slim ResNet-18, OREPA | folded kernels |' in table
    assert table in capsys.readouterr().out
    assert matplotlib.image.imread('int8/int8.png').ndim == 3
    # What was measured stays.
    run_here(*line)
    assert '0 of 1 jobs to do.' in capsys.readouterr().out
    assert rows_of('int8/results.csv') == [found]


def test_int8_of_nothing(tmp_path):
    with pytest.raises(SystemExit, match='error: no trained networks in .*accuracy.py'):
        run_here(INT8, '--study', tmp_path, '--out', tmp_path / 'new')
    with pytest.raises(SystemExit, match='error: no rows in .* without --report-only'):
        run_here(INT8, '--report-only', '--out', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
