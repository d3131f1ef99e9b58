import matplotlib.image
import pandas as pd
import pytest
from helpers import import_models
from idx_files import idx, random_arrays
from mmengine.config import Config
from tool_runs import run_here, tool

TOOL = 'benchmarks/plain_start.py'


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
    options = tuple(
        {**own, **part, **sizes, 'train_dataloader.dataset.indices': indices}
        for own, indices in zip(task.options, (8, -8))
    )
    task = task._replace(epochs=(1, 1), options=options)
    monkeypatch.setattr(module, 'TASKS', dict(classifier=task))
    return module


@pytest.mark.slow
def test_from_end_to_end(toy, tmp_path, capsys):
    out = tmp_path / 'out'
    run_here(TOOL, '--tasks', 'classifier', '--seeds', 1, '--out', out)
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
