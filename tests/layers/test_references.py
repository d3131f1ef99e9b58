"""Convs that a model holds elsewhere than under their names, and wrappers around it."""

from collections import deque, namedtuple
from functools import partial

import pytest
import torch
from helpers import assert_near
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmorepa import add_branches, switch_to_deploy

Pair = namedtuple('Pair', 'one other')

HOLDERS = {
    'list': lambda a, b: [a, b],
    'nested': lambda a, b: {'all': [(a,), {'b': b}]},
    'named tuple': lambda a, b: Pair(a, b),
    'deque': lambda a, b: deque([a, b]),
    'keys': lambda a, b: {a: 'a', b: 'b'},
}


def flat(value):
    if isinstance(value, dict):
        keys = [k for k in value if isinstance(k, nn.Module)]
        value = keys or value.values()
    if isinstance(value, nn.Module):
        return [value]
    return [module for item in value for module in flat(item)]


class Holder(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.order = hold(self.a, self.b)

    def forward(self, x):
        for conv in flat(self.order):
            x = conv(x)
        return x


@pytest.mark.parametrize('kind', HOLDERS)
def test_plain_containers(kind):
    model = Holder(HOLDERS[kind])
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    add_branches(model)
    assert flat(model.order) == [model.a, model.b]
    out = model(x)
    assert_near(out, expected)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    switch_to_deploy(model)
    assert flat(model.order) == [model.a, model.b] and type(model.a) is nn.Conv2d
    assert_near(model(x), expected)


class Runner:
    def __init__(self, conv):
        self.conv = conv


@pytest.mark.parametrize(
    'hide',
    [
        lambda conv: conv.forward,
        lambda conv: partial(conv),
        lambda conv: lambda x: conv(x),
        lambda conv: Runner(conv).conv,
    ],
)
def test_objects_and_functions(hide):
    model = Holder(lambda a, b: [a, b])
    run = hide(model.a)
    x = torch.randn(2, 3, 9, 9)
    expected = run(x)
    add_branches(model)
    out = run(x)
    assert_near(out, expected)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.a.parameters())
    run_later = hide(model.a)
    switch_to_deploy(model)
    assert_near(run(x), expected)
    assert_near(run_later(x), expected)


def worker(rank, meeting):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'file://{meeting}', rank=rank, world_size=1)
    mesh = init_device_mesh('cpu', (1,))
    wraps = [
        DistributedDataParallel,
        lambda model: FullyShardedDataParallel(model, device_id=torch.device('cpu')),
        lambda model: fully_shard(model, mesh=mesh),
    ]
    for wrap in wraps:
        with pytest.raises(RuntimeError, match='wrap it then'):
            add_branches(wrap(nn.Sequential(nn.Conv2d(3, 4, 3))))
    inner = nn.Sequential(nn.Conv2d(3, 4, 3))
    wrapped = DistributedDataParallel(inner)
    with pytest.raises(RuntimeError, match='wrap it then'):
        add_branches(inner)
    del wrapped
    model = add_branches(inner)
    x = torch.randn(1, 3, 5, 5)
    for part in (lambda wrapped: wrapped, lambda wrapped: wrapped.module):
        wrapped = DistributedDataParallel(
            add_branches(nn.Sequential(nn.Conv2d(3, 4, 3)))
        )
        with pytest.raises(RuntimeError, match='wrap it again'):
            switch_to_deploy(part(wrapped))
        expected = wrapped.eval()(x)
        switch_to_deploy(part(wrapped))
        assert_near(wrapped(x), expected)
        with pytest.raises(RuntimeError, match='wrap it again'):
            wrapped.train()(x)
    # Before the wrapper, all is well.
    wrapped = DistributedDataParallel(switch_to_deploy(model))
    wrapped(x).sum().backward()
    distributed.destroy_process_group()


def test_data_parallelism(tmp_path):
    multiprocessing.spawn(worker, args=(f'{tmp_path}/meeting',), nprocs=1)
