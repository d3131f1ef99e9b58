"""Folded training on two processes, where convs come and go: the ranks stay equal."""

import copy
import os
import socket
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from helpers import trained_like
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from torch import distributed as dist
from torch import nn
from torch.nn.utils import prune

from mmorepa.engine import FoldedDistributedDataParallel
from mmorepa.layers import OREPAConv2d

pytestmark = pytest.mark.slow

STEPS = 8
FOLDED, ONLINE = 'FoldedOptimWrapper', 'OptimWrapper'


class Network(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.a = OREPAConv2d(3, 4, 7, padding=3)
        self.b = OREPAConv2d(4, 4, 3, padding=1)
        self.c = OREPAConv2d(4, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x, mode='tensor'):
        y = self.head(self.c(self.b(self.a(x).tanh()).tanh()))
        return dict(loss=y.square().mean()) if mode == 'loss' else y


def nothing(model, step):
    pass


def unfreeze(model, step):
    model.b.requires_grad_(step >= 3)


def alternate(model, step):
    model.a.requires_grad_(step % 2 == 0)
    model.b.requires_grad_(step % 2 == 1)


def prune_at_once(model, step):
    weight = model.b.branches
    if step == 3:
        prune.l1_unstructured(weight, 'weight_origin', amount=0.5)
    if step == 6:
        prune.remove(weight, 'weight_origin')


def train(rank, folder, port, kind, change, options):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    # Different at the start, so that the wrapper has to make them equal.
    model = trained_like(Network().double(), seed=rank if rank else 7)
    wrapped = dict(
        FoldedOptimWrapper=FoldedDistributedDataParallel,
        OptimWrapper=MMDistributedDataParallel,
    )[kind]
    calls = []
    parallel = wrapped(model, broadcast_buffers=False, **options)
    parallel.register_forward_hook(lambda *_: calls.append(1))
    sgd = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-3)
    all_of_it = copy.deepcopy(model).requires_grad_(True)
    wrapper = build_optim_wrapper(all_of_it, dict(type=kind, optimizer=sgd))
    # An optimizer of all parameters, those too that are frozen at the start.
    wrapper.optimizer.param_groups[0]['params'] = list(model.parameters())
    images = torch.randn(
        STEPS, 4, 3, 9, 9, generator=torch.Generator().manual_seed(0)
    ).double()
    for step, batch in enumerate(images):
        change(model, step)
        # Pruning puts another tensor in a parameter's place.
        wrapper.optimizer.param_groups[0]['params'] = list(model.parameters())
        with wrapper.optim_context(parallel):
            loss = parallel(batch.chunk(2)[rank], mode='loss')['loss']
        wrapper.update_params(loss)
    assert len(calls) == STEPS
    torch.save(model.state_dict(), f'{folder}/{kind}{rank}.pt')
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ('change', 'options'),
    [
        (nothing, {}),
        (unfreeze, dict(find_unused_parameters=True)),
        (alternate, dict(find_unused_parameters=True)),
        (prune_at_once, {}),
    ],
    ids=['nothing', 'unfreeze', 'alternate', 'prune'],
)
def test_ranks_stay_equal(tmp_path, change, options):
    """Both ranks have the weights of online folding under PyTorch's own wrapper."""
    for kind in (FOLDED, ONLINE):
        if kind == ONLINE and change is prune_at_once:
            # PyTorch's wrapper does not know the parameter that pruning makes.
            continue
        arguments = (tmp_path, free_port(), kind, change, options)
        mp.spawn(train, arguments, nprocs=2)
    one, two = (torch.load(tmp_path / f'{FOLDED}{rank}.pt') for rank in (0, 1))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-12, atol=1e-12, msg=key)
    start = trained_like(Network().double(), seed=7).state_dict()
    moved = {key for key in start if not torch.allclose(start[key], one[key])}
    assert moved == set(start), 'all is trained'
    if change is prune_at_once:
        return
    online = torch.load(tmp_path / f'{ONLINE}0.pt')
    for key, value in online.items():
        torch.testing.assert_close(one[key], value, rtol=1e-9, atol=1e-10, msg=key)


def _in_one_process(rank, run, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=0, world_size=1)
    run()
    dist.destroy_process_group()


def _unfrozen_too_late():
    model = Network()
    model.b.requires_grad_(False)
    parallel = FoldedDistributedDataParallel(model)
    model.b.requires_grad_(True)
    with pytest.raises(RuntimeError, match='b was frozen when .* Freeze it after'):
        parallel(torch.randn(1, 3, 9, 9), mode='loss')


def _keeps_what_it_was_given():
    """One wrapper, made once: sizes of buckets are those that PyTorch chooses."""
    plain = MMDistributedDataParallel(nn.Conv2d(1, 1, 1))
    parallel = FoldedDistributedDataParallel(Network(), bucket_cap_mb=3)
    assert parallel.bucket_bytes_cap == 3 * 2**20
    names = {name for name, _ in parallel.module.named_parameters()}
    assert not any('held_kernel' in name for name in names)
    assert type(plain.reducer) is type(parallel.reducer)
    state = parallel.module.state_dict()
    Network().load_state_dict(state)


def _by_hand():
    parallel = FoldedDistributedDataParallel(Network())
    loss = parallel(torch.randn(1, 3, 9, 9), mode='loss')['loss']
    with pytest.raises(RuntimeError, match=r'update_params\(loss\)'):
        loss.backward()


def _accumulates():
    """Without reduction in between, gradients wait for the last pass."""
    model = trained_like(Network().double())
    twin = copy.deepcopy(model)
    parallel = FoldedDistributedDataParallel(model)
    options = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    wrappers = [
        build_optim_wrapper(m, dict(type=kind, **options))
        for m, kind in ((parallel, FOLDED), (twin, ONLINE))
    ]
    for _ in range(4):
        image = torch.randn(2, 3, 9, 9).double()
        for net, wrapper in zip((parallel, twin), wrappers):
            with wrapper.optim_context(net):
                loss = net(image, mode='loss')['loss']
            wrapper.update_params(loss)
    for one, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def _online_and_says_so(path):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance('parallel', log_file=str(path))
    model = Network()
    parallel = MMDistributedDataParallel(model)
    wrapper = build_optim_wrapper(
        parallel, dict(type=FOLDED, optimizer=dict(type='SGD', lr=0.1))
    )
    for _ in range(2):
        with wrapper.optim_context(parallel):
            loss = parallel(torch.randn(1, 3, 9, 9), mode='loss')['loss']
            assert model.b.held is None
        wrapper.update_params(loss)
    logger.handlers[-1].flush()
    assert path.read_text().count('trains with online folding') == 1


@pytest.mark.parametrize(
    'run',
    [_unfrozen_too_late, _keeps_what_it_was_given, _by_hand, _accumulates],
    ids=lambda run: run.__name__.strip('_'),
)
def test_one_process(run):
    mp.spawn(_in_one_process, (run, free_port()), nprocs=1)


def test_another_wrapper_trains_online_and_says_so(tmp_path):
    run = partial(_online_and_says_so, tmp_path / 'log.txt')
    mp.spawn(_in_one_process, (run, free_port()), nprocs=1)
