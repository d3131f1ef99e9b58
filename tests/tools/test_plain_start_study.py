import csv

import matplotlib.image
import pytest
from helpers import import_models
from idx_files import idx, random_arrays
from mmengine.config import Config
from tool_runs import ROOT, run_here, tool

TOOL = 'benchmarks/plain_start.py'
TABLE = dict(plain=(80, 82), quiet=(81, 85), balanced=(84,))
ARMS = ('plain', 'quiet', 'scratch')


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """One task of seconds: the classifier, on a few images of noise."""
    import_models('mmpretrain')
    data = tmp_path / 'data'
    data.mkdir()
    for name, array in random_arrays(train=48, test=16).items():
        (data / name).write_bytes(idx(array))
    part = {
        f'{split}_dataloader.dataset.data_root': str(data) for split in ('train', 'val')
    }
    sizes = {'train_dataloader.batch_size': 8}
    module = tool(TOOL)
    task = module.TASKS['classifier']
    options = tuple(
        {**own, **part, **sizes, 'train_dataloader.dataset.indices': indices}
        for own, indices in zip(task.options, (24, -24))
    )
    task = task._replace(epochs=(1, 1), options=options)
    monkeypatch.setattr(module, 'TASKS', dict(classifier=task))
    return module


def rows_of(out):
    with (out / 'results.csv').open(newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_from_end_to_end(toy, tmp_path, capsys):
    out = tmp_path / 'out'
    run_here(TOOL, '--seeds', 1, '--out', out)
    rows = rows_of(out)
    names = ('pretrained plain', 'pretrained OREPA', *ARMS)
    assert [row['name'] for row in rows] == list(names)
    assert {(row['seed'], row['epochs']) for row in rows} == {('0', '1+1')}
    assert all(0 <= float(row['value']) <= 100 for row in rows)
    assert matplotlib.image.imread(out / 'results.png').ndim == 3
    tables = (out / 'results.md').read_text()
    assert tables in capsys.readouterr().out + '\n'

    runs = out / 'runs/classifier-1+1'
    cfgs = {name: Config.fromfile(runs / f'{name}-0/run.py') for name in ARMS}
    plain, quiet, scratch = (cfgs[name] for name in ARMS)
    assert plain.load_from == quiet.load_from
    assert plain.load_from == str(runs / 'pretraining-plain-0/epoch_1.pth')
    assert scratch.load_from == str(runs / 'pretraining-orepa-0/epoch_1.pth')
    blocks = [cfg.model.backbone.block for cfg in cfgs.values()]
    assert blocks == ['plain', 'orepa', 'orepa']
    log = (runs / 'quiet-0/output.log').read_text()
    assert 'start from the plain kernels of the checkpoint (quiet start)' in log
    assert quiet.optim_wrapper.paramwise_cfg.stem_lr_mult == 0.02
    assert 'plain kernels' not in (runs / 'scratch-0/output.log').read_text()
    for cfg in cfgs.values():
        assert cfg.randomness.seed == 0
        assert cfg.param_scheduler == plain.param_scheduler
        assert cfg.optim_wrapper.optimizer == plain.optim_wrapper.optimizer

    # Of a study that was stopped, what is missing is trained, and no more. The row was
    # written before its pretraining was lost.
    lines = (out / 'results.csv').read_text().splitlines(keepends=True)
    (out / 'results.csv').write_text(''.join(lines[:-1]))
    (runs / 'pretraining-orepa-0/last_checkpoint').unlink()
    before = (runs / 'quiet-0/last_checkpoint').stat().st_mtime
    run_here(TOOL, '--seeds', 1, '--out', out)
    assert '1 of 5 jobs to do.' in capsys.readouterr().out
    assert (runs / 'quiet-0/last_checkpoint').stat().st_mtime == before
    assert rows_of(out)[:-1] == rows[:-1]
    # The same seed gives the same network.
    assert rows_of(out)[-1]['value'] == rows[-1]['value']


def test_report(toy, tmp_path, capsys):
    """Means, deviations and differences within seeds, of the rows that are there."""
    results = toy.Results(tmp_path / 'results.csv', toy.KEY, toy.VALUES)
    for name, values in TABLE.items():
        for seed, value in enumerate(values):
            for epochs, extra in (('1+1', 0), ('9+9', 50)):  # Of another schedule.
                row = dict(task='classifier', name=name, seed=str(seed), epochs=epochs)
                results.add({**row, 'value': str(value + extra), 'seconds': '1'})
    run_here(TOOL, '--out', tmp_path, '--report-only')
    assert (tmp_path / 'results.md').read_text().splitlines() == [
        '| Fashion-MNIST, top-1 accuracy (%) | mean ± deviation | minus plain | '
        'minus OREPA, quiet start | seeds |',
        '| --- | --: | --: | --: | --: |',
        '| plain | 81.00 ± 1.41 |  |  | 2 |',
        '| OREPA, quiet start | 83.00 ± 2.83 | +2.00 [-10.71, +14.71] |  | 2 |',
        '| OREPA, balanced start | 84.00 | +4.00 | +3.00 | 1 |',
    ]
    assert (tmp_path / 'results.png').is_file()


def test_names_and_colours():
    """No text has the block's former name; the colours are those of other figures."""
    module, charts = tool(TOOL), tool('analysis_tools/charts.py')
    assert [*module.PRETRAININGS] == ['plain', 'orepa']
    assert {arm.block for arm in module.ARMS.values()} == {'plain', 'orepa'}
    assert {*module.COLOURS} == {*ARMS} - {'plain'}
    assert {*module.COLOURS.values()} <= {*charts.SERIES}


def test_bad_input(toy, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='error: no rows in .* without --report-only'):
        run_here(TOOL, '--out', tmp_path / 'new', '--report-only')
    with pytest.raises(SystemExit):
        run_here(TOOL, '--seeds', 0)
    task = toy.TASKS['classifier']
    nowhere = {'train_dataloader.dataset.data_root': str(tmp_path / 'nowhere')}
    options = (task.options[0], {**task.options[1], **nowhere})
    monkeypatch.setitem(toy.TASKS, 'classifier', task._replace(options=options))
    with pytest.raises(SystemExit, match='error: the data folder .*nowhere'):
        run_here(TOOL, '--out', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_document_has_these_figures():
    """Of docs/plain_start.md: they are made of the rows beside it."""
    module = tool(TOOL)
    rows = module.Results(ROOT / 'docs/plain_start.csv', module.KEY, module.VALUES)
    text = (ROOT / 'docs/plain_start.md').read_text()
    for table in module.to_markdown(rows).split('\n\n'):
        assert table in text
