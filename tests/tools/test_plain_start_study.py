import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
from helpers import import_models
from idx_files import idx, random_arrays
from mmengine.config import Config
from tool_runs import run_here, tool

TOOL = 'benchmarks/plain_start.py'
SWEEP = 'benchmarks/stem_lr_sweep.py'


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """One task of seconds: the classifier, on a few images of noise."""
    import_models('mmpretrain')
    for name, array in random_arrays(train=16, test=8).items():
        (tmp_path / name).write_bytes(idx(array))
    part = {
        f'{split}_dataloader.dataset.data_root': str(tmp_path)
        for split in ('train', 'val')
    }
    sizes = {'train_dataloader.batch_size': 4}
    module = tool(TOOL)
    task = module.TASKS['classifier']
    phases = {
        name: getattr(task, name)._replace(
            epochs=1,
            options={
                **getattr(task, name).options,
                **part,
                **sizes,
                'train_dataloader.dataset.indices': indices,
            },
        )
        for name, indices in (('pretraining', 8), ('fine_tuning', -8))
    }
    task = task._replace(**phases)
    monkeypatch.setattr(module, 'TASKS', dict(classifier=task))
    return module


@pytest.mark.slow
def test_from_end_to_end(toy, tmp_path, capsys):
    out = tmp_path / 'out'
    line = (TOOL, '--tasks', 'classifier', '--seeds', 1, '--out', out)
    run_here(*line)
    rows = pd.read_csv(out / 'results.csv')
    assert [*rows.name] == ['pretrained plain', 'pretrained OREPA', *toy.ARMS]
    assert {*rows.seed} == {0} and {*rows.epochs} == {'1+1'}
    assert rows.value.between(0, 100).all()
    assert matplotlib.image.imread(out / 'plain_start.png').ndim == 3
    assert (out / 'tables.md').read_text() in capsys.readouterr().out

    runs = out / 'runs/classifier-1+1'
    cfgs = {name: Config.fromfile(runs / f'{name}-0/run.py') for name in toy.ARMS}
    plain, quiet, scratch = cfgs.values()
    assert plain.load_from == quiet.load_from
    assert plain.load_from == str(runs / 'pretraining-plain-0/epoch_1.pth')
    assert scratch.load_from == str(runs / 'pretraining-orepa-0/epoch_1.pth')
    blocks = [cfg.model.backbone.block for cfg in cfgs.values()]
    assert blocks == ['plain', 'orepa', 'orepa']
    assert (
        'plain kernels of the checkpoint' in (runs / 'quiet-0/output.log').read_text()
    )
    assert quiet.optim_wrapper.paramwise_cfg.stem_lr_mult == 0.02
    assert 'plain kernels' not in (runs / 'scratch-0/output.log').read_text()
    for cfg in cfgs.values():
        assert cfg.randomness.seed == 0
        assert cfg.param_scheduler == plain.param_scheduler
        assert cfg.optim_wrapper.optimizer == plain.optim_wrapper.optimizer

    # Of a study that was stopped, what is missing is trained, and no more. The row was
    # written before its pretraining was lost.
    text = (out / 'results.csv').read_text()
    (out / 'results.csv').write_text(''.join(text.splitlines(keepends=True)[:-1]))
    (runs / 'pretraining-orepa-0/last_checkpoint').unlink()
    before = (runs / 'quiet-0/last_checkpoint').stat().st_mtime
    run_here(*line)
    assert '1 of 5 jobs to do.' in capsys.readouterr().out
    assert (runs / 'quiet-0/last_checkpoint').stat().st_mtime == before
    # The same seed gives the same network.
    assert pd.read_csv(out / 'results.csv').value.tolist() == rows.value.tolist()


def test_report(toy, tmp_path):
    """Means, deviations and differences within seeds, of the rows that are there."""
    results = toy.studies.Results(tmp_path / 'results.csv', toy.KEY, toy.VALUES)
    table = dict(plain=(80.0, 82.0), quiet=(81.0, 85.0), balanced=(84.0,))
    for name, values in table.items():
        for seed, value in enumerate(values):
            for epochs, extra in (('1+1', 0), ('9+9', 50)):  # Of another schedule.
                row = dict(task='classifier', name=name, seed=str(seed), epochs=epochs)
                results.add({**row, 'value': str(value + extra), 'seconds': '1'})
    run_here(TOOL, '--out', tmp_path, '--report-only')
    assert (tmp_path / 'tables.md').read_text().splitlines()[4:] == [
        '| plain | 81.00 ± 1.41 |  |  | 2 |',
        '| OREPA, quiet start | 83.00 ± 2.83 | +2.00 [-10.71, +14.71] |  | 2 |',
        '| OREPA, balanced start | 84.00 | +4.00 | +3.00 | 1 |',
    ]


def test_bad_input(toy, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='error: no rows in .* without --report-only'):
        run_here(TOOL, '--out', tmp_path / 'new', '--report-only')
    task = toy.TASKS['classifier']
    nowhere = {'train_dataloader.dataset.data_root': str(tmp_path / 'nowhere')}
    phase = task.fine_tuning._replace(options={**task.fine_tuning.options, **nowhere})
    monkeypatch.setitem(toy.TASKS, 'classifier', task._replace(fine_tuning=phase))
    with pytest.raises(SystemExit, match='error: the data folder .*nowhere'):
        run_here(TOOL, '--tasks', 'classifier', '--out', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def fake(config, options, work_dir, metric):
    """A training that is better the nearer the multiplier is to 0.5."""
    multiplier, seed = options[plain_start().STEM_LR_MULT], options['randomness.seed']
    assert options['model.backbone.block'] == 'orepa'
    if 'faster-rcnn' in config.name:
        start = options['model.backbone.init_cfg.checkpoint']
        assert start.endswith(f'pretraining-orepa-{seed}.pth')
    value = 0.8 - abs(multiplier - 0.5) / 10 + seed / 100
    unit = 100 if 'accuracy' in metric else 1
    return plain_start().Training(value * unit, 12.0, 12.0, 'cpu', 1, [])


def plain_start():
    tool(SWEEP)
    return sys.modules['plain_start']


def test_sweep(tmp_path, monkeypatch, capsys):
    import_models('mmpretrain')
    monkeypatch.setattr(plain_start(), 'train', fake)
    monkeypatch.setattr(
        plain_start(), 'last_checkpoint', lambda path: Path(f'{path}.pth')
    )
    monkeypatch.setattr(tool(SWEEP), 'check_data', lambda tasks: None)
    line = ['--multipliers', 0.5, 1, '--out', tmp_path]
    run_here(SWEEP, '--seeds', 2, *line)
    assert '8 of 8 jobs to do.' in capsys.readouterr().out
    tables = (tmp_path / 'tables.md').read_text()
    assert '| 0.5 | 80.50 ± 0.71 | +5.00 [+5.00, +5.00] | 2 |' in tables
    assert matplotlib.image.imread(tmp_path / 'results.png').ndim == 3

    # Goes on with a third seed.
    run_here(SWEEP, '--seeds', 3, *line, '--tasks', 'detector')
    assert '2 of 6 jobs to do.' in capsys.readouterr().out
