"""Training on several processes has the weights of one with the whole batch.

Also where convs are frozen, trained again and pruned on the way.
"""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from helpers import trained_like
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.utils import prune

from mmorepa.engine import FoldedDistributedDataParallel
from mmorepa.layers import OREPAConv2d

STEPS, BATCH = 8, 4
FOLDED, ONLINE = 'FoldedOptimWrapper', 'OptimWrapper'
WRAPPERS = {FOLDED: FoldedDistributedDataParallel, ONLINE: MMDistributedDataParallel}


class Network(BaseModel):
    """Normalises by fixed statistics, so that a batch may be split."""

    def __init__(self) -> None:
        super().__init__()
        self.a = OREPAConv2d(3, 4, 7, padding=3, norm_cfg=dict(type='BN'))
        self.b = OREPAConv2d(4, 4, 3, padding=1, norm_cfg=dict(type='BN'))
        self.c = OREPAConv2d(4, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def train(self, mode=True):
        super().train(mode)
        self.a.norm.eval()
        self.b.norm.eval()
        return self

    def forward(self, x, mode='tensor'):
        y = self.c(self.b(self.a(x).tanh()).tanh())
        # One conv at two places, as the heads of detectors have them.
        y = self.head(self.c(y.tanh()))
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


COMES_AND_GOES = dict(find_unused_parameters=True)
# What happens before a step, options of the model's wrapper and of the optimizer's.
SCENARIOS = dict(
    nothing=(nothing, {}, {}),
    unfreeze=(unfreeze, COMES_AND_GOES, {}),
    alternate=(alternate, COMES_AND_GOES, {}),
    prune=(prune_at_once, {}, {}),
    accumulate=(nothing, {}, dict(accumulative_counts=2)),
    clip=(nothing, {}, dict(clip_grad=dict(max_norm=0.1))),
)


def start():
    return trained_like(Network().double())


def train(scenario, kind, rank=0, world=1):
    """Trains on a part of every batch; gives the state and the gradients' norms."""
    change, parallel_options, optim_options = SCENARIOS[scenario]
    model = start().train()
    parallel = model
    if world > 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += rank  # The wrapper has to make them equal.
        parallel = WRAPPERS[kind](model, broadcast_buffers=False, **parallel_options)
    sgd = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-3)
    all_of_it = copy.deepcopy(model).requires_grad_(True)
    wrapper = build_optim_wrapper(
        all_of_it, dict(type=kind, optimizer=sgd, **optim_options)
    )
    images = torch.randn(
        STEPS, BATCH, 3, 9, 9, generator=torch.Generator().manual_seed(0)
    ).double()
    for step, batch in enumerate(images):
        change(model, step)
        # All parameters, those too that are frozen at the start; pruning puts another
        # tensor in a parameter's place.
        wrapper.optimizer.param_groups[0]['params'] = list(model.parameters())
        with wrapper.optim_context(parallel):
            loss = parallel(batch.chunk(world)[rank], mode='loss')['loss']
        wrapper.update_params(loss)
    return model.state_dict()


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/meeting', rank=rank, world_size=2)
    results = {
        (scenario, kind): train(scenario, kind, rank, 2)
        for scenario in SCENARIOS
        for kind in WRAPPERS
    }
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """The states that each of two processes has after every scenario."""
    folder = tmp_path_factory.mktemp('ranks')
    mp.spawn(worker, (folder,), nprocs=2)
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


@pytest.mark.parametrize('scenario', SCENARIOS)
def test_equals_one_process(ranks, scenario):
    expected = train(scenario, ONLINE)
    assert not any(torch.equal(p, expected[k]) for k, p in start().named_parameters())
    for kind in WRAPPERS:
        for state in (rank[scenario, kind] for rank in ranks):
            for key, value in expected.items():
                torch.testing.assert_close(
                    state[key], value, rtol=1e-9, atol=1e-10, msg=f'{kind} {key}'
                )


@pytest.mark.usefixtures('one_process')
class TestOneProcess:
    def test_unfrozen_too_late(self):
        model = Network()
        model.b.requires_grad_(False)
        parallel = FoldedDistributedDataParallel(model)
        model.b.requires_grad_(True)
        with pytest.raises(RuntimeError, match='b was frozen when .* Freeze it after'):
            parallel(torch.randn(1, 3, 9, 9), mode='loss')

    def test_sends_as_many_bytes_as_a_plain_network(self):
        sent = []

        def count(state, bucket):
            sent.append(bucket.buffer().numel())
            return allreduce_hook(None, bucket)

        model = Network()
        parallel = FoldedDistributedDataParallel(model)
        parallel.register_comm_hook(None, count)
        wrapper = build_optim_wrapper(
            model, dict(type=FOLDED, optimizer=dict(type='SGD', lr=0.1))
        )
        with wrapper.optim_context(parallel):
            loss = parallel(torch.randn(1, 3, 9, 9), mode='loss')['loss']
        wrapper.update_params(loss)
        others = [p for n, p in model.named_parameters() if 'branches' not in n]
        kernels = [conv.kernel() for conv in (model.a, model.b, model.c)]
        assert sum(sent) == sum(t.numel() for t in (*others, *kernels))

    @pytest.mark.parametrize('how', [copy.deepcopy, pickle.dumps, 'exchanged'])
    def test_copies_do_not_train(self, how):
        """Their gradients would not be averaged."""
        parallel = FoldedDistributedDataParallel(Network())
        x = torch.randn(1, 3, 9, 9)
        parallel(x, mode='loss')
        if how == 'exchanged':
            parallel.module.b = copy.deepcopy(parallel.module.b)
        else:
            parallel = how(parallel)
        if isinstance(parallel, bytes):
            parallel = pickle.loads(parallel)
        with pytest.raises(RuntimeError, match='would not be averaged: .* a copy'):
            parallel(x, mode='loss')
        with torch.no_grad():
            parallel(x, mode='loss')
        FoldedDistributedDataParallel(parallel.module)(x, mode='loss')

    def test_the_model_in_another_wrapper(self):
        """It averages the gradients of all branches."""
        model = FoldedDistributedDataParallel(Network()).module
        assert not MMDistributedDataParallel(model).parameters_to_ignore

    def test_by_hand(self):
        parallel = FoldedDistributedDataParallel(Network())
        loss = parallel(torch.randn(1, 3, 9, 9), mode='loss')['loss']
        with pytest.raises(RuntimeError, match=r'update_params\(loss\)'):
            loss.backward()

    def test_another_wrapper_trains_online_and_says_so(self, log):
        model = Network()
        parallel = MMDistributedDataParallel(model)
        wrapper = build_optim_wrapper(
            parallel, dict(type=FOLDED, optimizer=dict(type='SGD', lr=0.1))
        )
        for _ in range(2):
            with wrapper.optim_context(parallel):
                loss = parallel(torch.randn(1, 3, 9, 9), mode='loss')['loss']
                assert model.b.training_scope is None
            wrapper.update_params(loss)
        assert sum('trains with online folding' in text for text in log) == 1
