"""Training sharded by FSDP, in MMEngine's runner and in a loop of one's own."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from helpers import assert_near, assert_near_states
from mmengine.runner import FlexibleRunner
from runners import Colours, TinyClassifier, colours_loader, make_runner
from torch import distributed as dist
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from mmorepa import switch_to_deploy
from mmorepa.converters import deploy_checkpoint, read_checkpoint
from mmorepa.layers import ReparamConv2d

pytestmark = pytest.mark.slow

WORLD, BATCH, IMAGES = 2, 8, 32
EACH_CONV = ModuleWrapPolicy({ReparamConv2d})


def options_for(world):
    loader = colours_loader(batch_size=BATCH // world, dataset=Colours(IMAGES))
    return dict(
        model=TinyClassifier(norm_eval=True),
        train_dataloader=loader,
        val_dataloader=dict(loader),
        test_dataloader=None,
        test_cfg=None,
        test_evaluator=None,
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        custom_hooks=[dict(type='FoldedEvaluationHook')],
    )


def make_flexible_runner(work_dir, **options):
    wrapper = dict(
        type='MMFullyShardedDataParallel',
        device_id=torch.device('cpu'),
        auto_wrap_policy=EACH_CONV,
    )
    strategy = dict(type='FSDPStrategy', state_dict_cfg='full', model_wrapper=wrapper)
    torch.manual_seed(0)
    return make_runner(
        work_dir,
        strategy=strategy,
        kind=FlexibleRunner,
        launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        **options_for(WORLD),
        **options,
    )


def strategy_of_mmengine(folder):
    """Trains two epochs; another runner loads what was saved, and validates."""
    runner = make_flexible_runner(f'{folder}/train')
    runner.train()
    with pytest.raises(RuntimeError, match='gather them by'):
        switch_to_deploy(runner.model)
    # Not resumed: MMEngine gives the optimizer's state to PyTorch with the arguments
    # in the order of PyTorch 2.0.
    saved = f'{folder}/train/epoch_2.pth'
    runner = make_flexible_runner(f'{folder}/val', load_from=saved)
    runner.val()
    if dist.get_rank() == 0:
        torch.save(runner.val_evaluator.metrics[0].logits, f'{folder}/logits.pth')


def worker(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', f'file://{folder}/meeting', rank=rank, world_size=WORLD
    )
    strategy_of_mmengine(folder)
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return folder


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    """The weights of one process with the whole batch."""
    torch.manual_seed(0)
    runner = make_runner(tmp_path_factory.mktemp('one'), **options_for(1))
    runner.train()
    return runner.model.state_dict()


def test_strategy_of_mmengine(folder, expected):
    """Its full checkpoints are those of an ordinary run, and deployed as those are."""
    checkpoint = read_checkpoint(f'{folder}/train/epoch_2.pth')
    assert_near_states(checkpoint['state_dict'], expected, 1e-4)
    plain = TinyClassifier(deploy=True).eval()
    training = TinyClassifier()
    plain.load_state_dict(deploy_checkpoint(training, checkpoint)['state_dict'])
    logits = torch.load(folder / 'logits.pth')
    assert_near(logits, plain(Colours(IMAGES).images))
