"""Folds that are recorded and replayed, by a recorder that stands in for CUDA's."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import trained_like
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmorepa import folded, switch_to_deploy
from mmorepa.engine import FoldedDistributedDataParallel
from mmorepa.layers import backward_to_branches, build_conv, capture, held
from mmorepa.layers.capture import RecordedFolds


class StandIn:
    """Runs again what it recorded, and writes the results to the same memory."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run):
        self.recorded += 1
        results = run()
        # As CUDA's, it counts no version.
        memory = [None if r is None else r.data for r in results]

        def replay():
            self.replayed += 1
            new = run()
            for old, value in zip(memory, new):
                if old is not None:
                    old.copy_(value.detach())
            if new[0] is not None and new[0].grad_fn is not None:
                results[:] = new  # CUDA needs no graph to replay a derivative.

        return results, replay


class Blind(StandIn):
    """As CUDA's, it looks at no version."""

    def __call__(self, run):
        results, replay = super().__call__(run)

        def replay_anyway():
            with contextlib.suppress(RuntimeError):
                replay()

        return results, replay_anyway


def stand_in(monkeypatch, recorder):
    monkeypatch.setattr(capture, 'record', recorder)
    monkeypatch.setattr(capture, 'can_record_on', lambda device: True)
    return recorder


@pytest.fixture
def recorder(monkeypatch):
    return stand_in(monkeypatch, StandIn())


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [
        build_conv('deep_linear', 2, 4, 7, padding=3),
        build_conv('orepa', 4, 4, 3, padding=1),
        nn.ReLU(),
        build_conv('orepa', 4, 4, 3, padding=1, groups=2),
        build_conv('dbb', 4, 4, 3, padding=1),
        build_conv('orepa', 4, 3, 1),
    ]
    return trained_like(nn.Sequential(*layers)).to(dtype).train()


def wrapped(model, capture=True, kind='FoldedOptimWrapper', **options):
    optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-3)
    cfg = dict(type=kind, optimizer=optimizer, capture=capture, **options)
    wrapper = build_optim_wrapper(model, cfg)
    wrapper.initialize_count_status(model, 0, 100)
    return wrapper


def loss_of(model, wrapper, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    images = torch.rand(2, 2, 6, 6, generator=generator, dtype=torch.float64)
    with wrapper.optim_context(model):
        return model(images.to(dtype)).square().mean()


def freeze(model, wrapper, step):
    if step == 2:
        model[1].requires_grad_(False)
    if step == 4:
        model[1].requires_grad_(True)


def evaluate(model, wrapper, step):
    with folded(model.eval()), torch.no_grad():
        model(torch.rand(1, 2, 6, 6, dtype=torch.float64))
    model.train()


def resume(model, wrapper, step):
    states = copy.deepcopy((model.state_dict(), wrapper.state_dict()))
    if step == 3:
        model.load_state_dict(states[0])
        wrapper.load_state_dict(states[1])


def swap_averages(model, wrapper, step):
    """As MMEngine's EMAHook does around a validation."""
    with torch.no_grad():
        for parameter in model.parameters():
            kept = parameter.data.clone()
            parameter.data.copy_(kept * 0.5)
            parameter.data.copy_(kept)


def zero_to_zero(model, wrapper, step):
    wrapper.optimizer.zero_grad(set_to_none=False)


def assign(model, wrapper, step):
    if step == 2:
        theirs = {id(parameter) for parameter in model[1].parameters()}
        state = {key: value.clone() for key, value in model[1].state_dict().items()}
        model[1].load_state_dict(state, assign=True)
        group = wrapper.optimizer.param_groups[0]
        group['params'] = [p for p in group['params'] if id(p) not in theirs]
        group['params'] += model[1].parameters()


def deploy(model, wrapper, step):
    if step == 3:
        model[3].switch_to_deploy()


def write(model, wrapper, step):
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.data.mul_(1.01)


def replace(model, wrapper, step):
    """Other branches, with the numbers of the former ones."""
    if step == 2:
        former = model[1].branches
        model[1].branches = copy.deepcopy(former)
        group = wrapper.optimizer.param_groups[0]
        theirs = {id(parameter) for parameter in former.parameters()}
        group['params'] = [p for p in group['params'] if id(p) not in theirs]
        group['params'] += model[1].branches.parameters()


def move(model, wrapper, step):
    if step == 2:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def nothing(model, wrapper, step):
    pass


def assert_same(one, other, rtol=1e-9, atol=1e-12):
    pairs = zip(one.state_dict().items(), other.state_dict().values())
    for (name, value), expected in pairs:
        assert torch.allclose(value, expected, rtol=rtol, atol=atol), name


def train(model, wrapper, between=nothing, steps=6):
    for step in range(steps):
        wrapper.update_params(loss_of(model, wrapper, step))
        between(model, wrapper, step)


@pytest.mark.parametrize(
    ('between', 'options', 'times'),
    [
        (nothing, {}, 1),
        (nothing, dict(accumulative_counts=3), 1),
        (nothing, dict(clip_grad=dict(max_norm=0.1)), 1),
        (evaluate, {}, 1),
        (resume, {}, 1),
        (swap_averages, {}, 1),
        (zero_to_zero, {}, 1),
        (write, {}, 1),
        (freeze, {}, 3),
        (assign, {}, 2),
        (deploy, {}, 2),
        (move, {}, 2),
        (replace, {}, 2),
    ],
)
def test_trains_as_without(recorder, between, options, times):
    plain, recorded = network(), network()
    train(plain, wrapped(plain, capture=False, **options), between)
    train(recorded, wrapped(recorded, **options), between)
    assert recorder.recorded == 2 * times and recorder.replayed > 6
    assert_same(recorded, plain)


def test_data_parallel(recorder, one_process):
    """The leaves stay from step to step, and no_sync makes them wait."""
    models = []
    for capture_ in (False, True):
        model = FoldedDistributedDataParallel(network()[1:2])
        wrapper = wrapped(model, capture_, accumulative_counts=2)
        for step in range(6):
            images = torch.full((1, 4, 5, 5), 0.1 + step, dtype=torch.float64)
            with wrapper.optim_context(model):
                loss = model(images).square().mean()
            wrapper.update_params(loss)
        models.append(model)
    assert recorder.recorded == 2
    assert_same(*models)


def test_by_the_constructor(recorder):
    model = network()
    options = dict(constructor='OREPAOptimWrapperConstructor')
    train(model, wrapped(model, kind='OptimWrapper', **options), steps=2)
    assert recorder.recorded == 2
    plain = nn.Sequential(nn.Conv2d(2, 2, 3))
    train(plain, wrapped(plain, kind='OptimWrapper', **options), steps=1)
    assert recorder.recorded == 2
    with pytest.raises(ValueError, match="found 'yes'"):
        wrapped(model, kind='OptimWrapper', folded='yes', **options)
    with pytest.raises(ValueError, match='folded=False'):
        wrapped(model, kind='OptimWrapper', folded=False, **options)
    with pytest.raises(ValueError, match="'compiled'"):
        wrapped(model, capture='cuda')


def test_two_models(recorder):
    models = [network() for _ in range(3)]
    models[1][0].load_state_dict(trained_like(models[1][0]).state_dict())
    wrapper = wrapped(nn.ModuleList(models[:2]))
    for step in range(3):
        for model in models[:2]:
            wrapper.update_params(loss_of(model, wrapper, step))
    assert recorder.recorded == 4


def test_losses_of_several_passes(recorder):
    plain, recorded = network(), network()
    for model, capture_ in ((plain, False), (recorded, True)):
        wrapper = wrapped(model, capture_)
        for step in range(3):
            loss = loss_of(model, wrapper, step) + loss_of(model, wrapper, step + 9)
            wrapper.update_params(loss)
        loss = loss_of(model, wrapper, 7)
        wrapper.zero_grad()
        wrapper.backward(loss, retain_graph=True)
        wrapper.backward(loss)
        wrapper.step()
    assert_same(recorded, plain)


def test_a_loss_of_former_numbers_is_refused(recorder):
    model = network()
    wrapper = wrapped(model)
    former = loss_of(model, wrapper, 0)
    wrapper.update_params(loss_of(model, wrapper, 1))
    loss_of(model, wrapper, 2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        former.backward()


def test_two_passes_in_one_backward(recorder):
    """Both write to the memory of the derivative, one after the other."""
    found = []
    for capture_ in (False, True):
        model = network()[1:2]
        folds = RecordedFolds() if capture_ else None
        leaves, loss = [], 0
        for step in range(2):
            images = torch.full((1, 4, 5, 5), 1.0 + step, dtype=torch.float64)
            with held(model, folds) as kernels:
                loss = loss + model(images).square().sum()
            leaves += kernels
        for leaf in leaves:
            leaf.graph.is_deferred = True
        loss.backward()
        backward_to_branches(leaves)
        found.append([p.grad for p in model[0].branches.parameters()])
    assert recorder.recorded == 2
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('by_hand', [False, True])
def test_branches_written_to_before_backward_are_refused(monkeypatch, by_hand):
    """Where the conv's own derivative does not need its kernel."""
    stand_in(monkeypatch, Blind())
    model = network()[:1]
    wrapper = wrapped(model)
    loss, other = loss_of(model, wrapper, 0), loss_of(model, wrapper, 1)
    wrapper.update_params(loss)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        other.backward() if by_hand else wrapper.backward(other)


@pytest.mark.parametrize('capture_', [False, True])
def test_frozen_branches_written_to_before_backward_are_refused(monkeypatch, capture_):
    stand_in(monkeypatch, Blind())
    model = network()[1:2]
    scale = model[0].branches.scale.requires_grad_(False)
    images = torch.ones(1, 4, 5, 5, dtype=torch.float64)
    with held(model, RecordedFolds() if capture_ else None):
        loss = model(images).square().sum()
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


@pytest.mark.parametrize('capture_', [False, True])
def test_models_are_freed(recorder, capture_):
    model = network()
    wrapper = wrapped(model, capture_)
    train(model, wrapper, steps=2)
    conv = weakref.ref(model[1])
    del model, wrapper
    gc.collect()
    assert conv() is None


@pytest.mark.parametrize('capture_', [False, True])
@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_copies_of_a_wrapper(recorder, capture_, copied):
    model = network()
    wrapper = wrapped(model, capture_)
    train(model, wrapper, steps=2)
    twins = copied((model, wrapper))
    train(model, wrapper, steps=2)
    train(*twins, steps=2)
    for one, other in zip(model.parameters(), twins[0].parameters()):
        assert torch.equal(one, other)


def test_backward_by_hand(recorder):
    plain, recorded = network(), network()
    for model, capture_ in ((plain, False), (recorded, True)):
        wrapper = wrapped(model, capture_)
        for step in range(2):
            loss_of(model, wrapper, step).backward()
    for one, other in zip(plain.parameters(), recorded.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_gradients_are_the_callers(recorder):
    """One that was cloned stays, and one that is added to is added to."""
    model = network()
    model[4].eval()  # A border of running means changes with every pass.
    wrapper = wrapped(model)
    wrapper.backward(loss_of(model, wrapper, 0))
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    wrapper.backward(loss_of(model, wrapper, 0))
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    for one, two in zip(first, twice):
        assert torch.allclose(2 * one, two)


@pytest.mark.parametrize('dtype', [torch.bfloat16])
def test_half_precision(recorder, dtype):
    """Under autocast, the conv gets a kernel in half precision, once."""
    plain, recorded = network(torch.float32), network(torch.float32)
    found = []
    recorded[1].register_forward_pre_hook(
        lambda conv, _: found.append(conv.kernel().dtype)
    )
    for model, capture_ in ((plain, False), (recorded, True)):
        kind = 'FoldedBFloat16OptimWrapper'
        train(model, wrapped(model, capture_, kind=kind), steps=2)
    assert found == [dtype, dtype]
    assert_same(recorded, plain, rtol=0.02, atol=0.002)


def test_it_says_why_not(log, recorder):
    model = network()
    hook = model[1].branches.scale.register_hook(lambda gradient: gradient)
    wrapper = wrapped(model)
    train(model, wrapper, steps=2)
    (line,) = log
    assert 'hooks' in line
    assert not recorder.recorded
    hook.remove()
    train(model, wrapper, steps=2)
    assert recorder.recorded


def test_a_recorder_that_fails(log, monkeypatch):
    class Failing(StandIn):
        def __call__(self, run):
            self.recorded += 1
            raise RuntimeError('operation not permitted when stream is capturing')

    recorder = stand_in(monkeypatch, Failing())
    plain, recorded = network(), network()
    train(plain, wrapped(plain, capture=False))
    train(recorded, wrapped(recorded))
    assert len(log) == 1 and 'not permitted' in log[0] and recorder.recorded == 1
    for one, other in zip(plain.parameters(), recorded.parameters()):
        assert torch.equal(one, other)


def test_without_a_gpu(log):
    """The log says what is missing, and the training goes on."""
    model = network()
    train(model, wrapped(model), steps=2)
    assert len(log) == 1 and 'cpu' in log[0]


def test_copies_and_deployed_forms_are_free(recorder):
    model = network()
    wrapper = wrapped(model)
    train(model, wrapper, steps=2)
    twin = copy.deepcopy(model).eval()
    before = twin(torch.ones(1, 2, 6, 6, dtype=torch.float64))
    train(model, wrapper, steps=1)
    assert torch.equal(before, twin(torch.ones(1, 2, 6, 6, dtype=torch.float64)))
    image = torch.ones(1, 2, 6, 6, dtype=torch.float64)
    expected = model.eval()(image)
    assert torch.allclose(switch_to_deploy(model)(image), expected)


@pytest.mark.slow
def test_compiled(recorder):
    """The operations that are recorded may be those of torch.compile."""
    plain, recorded = network()[5:], network()[5:]
    for model, capture_ in ((plain, False), (recorded, 'compiled')):
        wrapper = wrapped(model, capture_)
        for step in range(2):
            with wrapper.optim_context(model):
                loss = model(torch.full((1, 4, 3, 3), 1.0 + step).double()).mean()
            wrapper.update_params(loss)
    assert recorder.recorded == 2
    assert_same(recorded, plain)


def test_a_recording_is_told_apart(recorder):
    convs = [build_conv('orepa', 2, 2, 3, padding=1) for _ in range(2)]
    folds = RecordedFolds()
    for _ in range(2):
        assert len(folds.fold(convs)) == 2
    assert folds.count == 1
    folds.fold(convs[:1])
    folds.fold(convs[:1], torch.bfloat16)
    convs[0].bfloat16()
    folds.fold(convs[:1])
    assert folds.count == 4
    assert folds.fold([]) is None
