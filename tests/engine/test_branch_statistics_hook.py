"""What it writes, and that it disturbs nothing, in real runners."""

import json
import logging

import pytest
import torch
from mmengine.dist import utils as dist_utils
from runners import Probe, TinyClassifier, make_runner

from mmorepa import switch_to_deploy
from mmorepa.analysis import branch_kernels, relative_step, shares
from mmorepa.engine import BranchStatisticsHook
from mmorepa.layers import DBBConv2d, OREPAConv2d, PlainConv2d

HOOK = dict(type='BranchStatisticsHook', interval=2)
SGD = dict(type='SGD', lr=0.05)


def train(folder, *hooks, optim_wrapper=None, **options):
    """Trains for 2 epochs of 3 steps."""
    optim_wrapper = dict(optimizer=SGD, **(optim_wrapper or {}))
    runner = make_runner(
        folder, custom_hooks=[*hooks], optim_wrapper=optim_wrapper, **options
    )
    runner.train()
    return runner


def written(folder):
    """The records of the hook, by step."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    records = map(json.loads, path.read_text().splitlines())
    return {
        r['step']: r for r in records if any(key.startswith('kernel_step') for key in r)
    }


def test_what_is_written(tmp_path):
    """At every other step, of the kernels before and after it."""
    kernels, found = [], []

    def look(runner):
        model = runner.model
        kernels.append(model.conv1.folded_kernel().detach().clone())
        found.append(shares(branch_kernels(model)[0].kernels))

    train(
        tmp_path,
        Probe(before_train_iter=look, after_train=look),
        HOOK,
    )
    records = written(tmp_path)
    assert [*records] == [2, 4, 6]
    for step, record in records.items():
        moved = relative_step(kernels[step - 1], kernels[step])
        assert moved > 1e-5
        assert record['kernel_step/conv1'] == pytest.approx(moved, rel=1e-3)
        for branch, share in found[step].items():
            assert record[f'branch_share/conv1/{branch}'] == pytest.approx(
                share.size, rel=1e-4
            )
    # Six branches and two, a share and a scale each, and two kernels.
    assert len(records[2]) == 8 * 2 + 2 + 1
    assert records[2]['branch_scale/conv1/pointwise'] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    'optim_wrapper',
    [
        dict(type='OptimWrapper'),
        dict(type='FoldedBFloat16OptimWrapper'),
        dict(type='FoldedOptimWrapper', accumulative_counts=2),
    ],
    ids=str,
)
def test_changes_nothing(tmp_path, optim_wrapper):
    plain = train(tmp_path / 'a', optim_wrapper=optim_wrapper).model.state_dict()
    watched = train(tmp_path / 'b', HOOK, optim_wrapper=optim_wrapper).model
    for key, tensor in watched.state_dict().items():
        assert torch.equal(tensor, plain[key])
    steps = [r['kernel_step/conv1'] for r in written(tmp_path / 'b').values()]
    assert len(steps) == 3 and all(1e-5 < step < 1 for step in steps)


class Mixed(TinyClassifier):
    """A deep linear conv, a block with norms, and a plain conv."""

    def __init__(self):
        super().__init__()
        norm = dict(norm_cfg=dict(type='BN'), bias=False, padding=1)
        self.conv1 = torch.nn.Sequential(
            OREPAConv2d(3, 8, 7, padding=3), DBBConv2d(8, 8, 3, **norm)
        )
        self.conv2 = PlainConv2d(8, 8, 3, **norm)


def test_all_kinds_of_layers(tmp_path):
    train(tmp_path, HOOK, model=Mixed())
    keys = written(tmp_path)[2].keys()
    steps = {key for key in keys if key.startswith('kernel_step')}
    assert steps == {f'kernel_step/{name}' for name in ('conv1.0', 'conv1.1', 'conv2')}
    layers = {key.split('/')[1] for key in keys if key.startswith('branch_share')}
    assert layers == {'conv1.0.1', 'conv1.0.2', 'conv1.0.3', 'conv1.1'}


def test_the_main_process_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(dist_utils, 'get_rank', lambda group=None: 1)
    hook = BranchStatisticsHook(interval=1)
    # A process that is not the main one does not even look at what it is given.
    hook.before_train_iter(None, 0)
    hook.after_train_iter(None, 0)


def test_data_parallelism(tmp_path, one_process):
    runner = make_runner(
        tmp_path,
        custom_hooks=[HOOK],
        optim_wrapper=dict(type='FoldedOptimWrapper', optimizer=SGD),
    )
    runner.model = runner.wrap_model(
        dict(type='FoldedDistributedDataParallel'), runner.model.to('cpu')
    )
    runner.train()
    record = written(tmp_path)[2]
    assert 0 < record['kernel_step/conv1'] < 1
    assert 0 < record['branch_share/conv1/origin'] < 1


def test_errors(tmp_path):
    with pytest.raises(ValueError, match='at least 1'):
        BranchStatisticsHook(interval=0)
    with pytest.raises(ValueError, match='nothing to measure'):
        train(tmp_path, HOOK, model=switch_to_deploy(TinyClassifier()))


def test_a_scalar_that_is_no_number_is_left_out(tmp_path, caplog):
    """A branch whose weights are zero has a share; kernels of zeros have none."""
    model = TinyClassifier()
    with torch.no_grad():
        model.conv1.branches.scale.zero_()
        for parameter in model.conv1.branches.parameters():
            parameter.zero_()
    model.conv1.requires_grad_(False)
    with caplog.at_level(logging.ERROR):
        train(tmp_path, HOOK, model=model)
    keys = written(tmp_path)[2].keys()
    assert 'branch_share/conv2/origin' in keys
    assert 'branch_share/conv1/origin' not in keys
