"""The cache of folded kernels: one fold for many passes, and never a stale one."""

import copy
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_near,
    assert_same_gradients,
    counted_folds,
    gradients,
    trained_like,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from mmorepa.functional import compiled
from mmorepa.layers import OREPAConv2d, eval_form
from mmorepa.layers.online_fold import OnlineFold

# Without groups the fold has a closed form, with groups autograd differentiates it.
defaults = dict(groups=1)


@pytest.fixture(autouse=True, params=[1, 2], ids=['closed_form', 'autograd'])
def groups(request):
    defaults['groups'] = request.param
    return request.param


def make(k=3, **kwargs):
    options = dict(padding=k // 2, bias=False, **defaults)
    return trained_like(OREPAConv2d(4, 6, k, **{**options, **kwargs}))


def image(**kwargs):
    return torch.randn(2, 4, 7, 7, **kwargs)


def afresh(conv):
    """The kernel that an empty cache serves, to the last bit."""
    return OnlineFold()(conv.branches)


def projection(y):
    """The weights of the sum that :func:`gradients` differentiates."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return weights.to(y.dtype)


def uncached(conv, x):
    """What ``conv`` must return, straight from its parameters."""
    return F.conv2d(
        x, conv.branches(), conv.bias, padding=conv.padding, groups=conv.groups
    )


def assert_fresh(conv, tolerance=1e-6):
    """Checks outputs and gradients, with and without grad, against no cache at all."""
    x = image(dtype=next(conv.parameters()).dtype)
    with torch.no_grad():
        assert_near(conv(x), uncached(conv, x), tolerance)
    with torch.inference_mode():
        assert_near(conv(x), uncached(conv, x), tolerance)
    y = conv(x)
    assert_near(y, uncached(conv, x), tolerance)
    if y.requires_grad:
        assert_same_gradients(gradients(y, conv), gradients(uncached(conv, x), conv))


# How many folds


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'mode', [torch.no_grad, torch.inference_mode, torch.enable_grad]
)
def test_one_fold_for_many_forwards(mode, training):
    conv = make().train(training)
    with counted_folds(conv) as folds, mode():
        outputs = [conv(image()) for _ in range(3)]
        assert len(folds) == 1
    assert all(y.requires_grad == (mode is torch.enable_grad) for y in outputs)


def test_frozen_conv_folds_once_in_train_mode():
    conv = make().train().requires_grad_(False)
    with counted_folds(conv) as folds:
        for _ in range(3):
            x = image(requires_grad=True)
            y = conv(x)
            y.sum().backward()
            assert x.grad.any()
        assert len(folds) == 1


def test_partly_frozen_branches():
    conv = make()
    conv.branches.scale.requires_grad_(False)
    conv(image()).sum().backward()
    assert conv.branches.scale.grad is None
    assert conv.branches.weight_origin.grad.any()


def test_a_kernel_with_gradient_serves_passes_without():
    conv = make().eval()
    with counted_folds(conv) as folds:
        conv(image())
        with torch.no_grad():
            assert not conv(image()).requires_grad
            assert not conv.kernel().requires_grad
        with torch.inference_mode():
            conv(image())
        assert conv(image()).requires_grad
        assert len(folds) == 1


def test_one_fold_a_training_step(groups):
    conv = make().train()
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    with counted_folds(conv) as folds:
        for step in range(3):
            conv(image()).sum().backward()
            # The backward pass computes the terms again instead of storing them,
            # unless it needs none of them.
            assert len(folds) == groups * (step + 1)
            optimizer.step()
            optimizer.zero_grad()


def test_shared_conv_folds_once_and_its_gradients_add_up(groups):
    conv = make()
    levels = [torch.randn(2, 4, size, size) for size in (3, 5, 7, 9)]
    with counted_folds(conv) as folds:
        outputs = [conv(x) for x in levels]
        assert len(folds) == 1
        flat = torch.cat([y.flatten(1) for y in outputs], 1)
        actual = gradients(flat, conv)
        assert len(folds) == groups
    flat = torch.cat([uncached(conv, x).flatten(1) for x in levels], 1)
    assert_same_gradients(actual, gradients(flat, conv))


def test_mode_change_forgets_the_kernel():
    """Training loops switch modes at every validation: no kernel outlives it."""
    conv = make().eval()
    with counted_folds(conv) as folds, torch.no_grad():
        conv(image())
        conv.train()
        conv(image())
        assert len(folds) == 2


def test_conversion_frees_the_kernel():
    """A network that moves from the GPU leaves nothing behind."""
    conv = make().eval()
    kernel = weakref.ref(conv.kernel())
    assert kernel() is not None
    conv.double()
    assert kernel() is None


# Never a stale one


def test_gradients_of_kernel_sizes():
    for k in (1, 3, 5, 7):
        assert_fresh(make(k))


def filled(conv, shift):
    return {name: v + shift for name, v in conv.state_dict().items()}


@pytest.mark.parametrize('assign', [False, True])
def test_load_state_dict(assign):
    conv = make().eval()
    assert_fresh(conv)
    conv.load_state_dict(filled(conv, 0.1), assign=assign)
    assert_fresh(conv)


@pytest.mark.parametrize('assign', [False, True])
def test_load_state_dict_of_the_branches_alone(assign):
    conv = make().eval()
    assert_fresh(conv)
    conv.branches.load_state_dict(filled(conv.branches, 0.1), assign=assign)
    assert_fresh(conv)


OPTIMIZERS = [
    (torch.optim.SGD, dict(momentum=0.9)),
    (torch.optim.SGD, dict(foreach=True)),
    (torch.optim.SGD, dict(fused=True)),
    (torch.optim.AdamW, dict()),
    (torch.optim.AdamW, dict(foreach=True)),
    (torch.optim.AdamW, dict(fused=True)),
]


@pytest.mark.parametrize(('kind', 'options'), OPTIMIZERS)
def test_optimizer_steps(kind, options):
    conv = make().train()
    twin = copy.deepcopy(conv)
    optimizers = [kind(c.parameters(), lr=0.05, **options) for c in (conv, twin)]
    for _ in range(3):
        x = image()
        conv(x).square().mean().backward()
        uncached(twin, x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_fresh(conv)
    assert_near(conv.kernel(), twin.branches(), 1e-4)


@pytest.mark.parametrize('learning_rate', [0.0, 1e-6])
def test_smallest_steps(learning_rate):
    conv = make().train()
    optimizer = torch.optim.SGD(conv.parameters(), lr=learning_rate, fused=True)
    for _ in range(2):
        conv(image()).sum().backward()
        optimizer.step()
        assert torch.equal(conv.kernel(), afresh(conv))


def test_dtype_change():
    conv = make().eval()
    x = image()
    assert_fresh(conv)
    conv.double()
    assert conv(x.double()).dtype == torch.float64
    assert_fresh(conv)
    conv.branches.float()
    assert conv.kernel().dtype == torch.float32
    assert_fresh(conv)
    conv.bfloat16()
    assert conv(x.bfloat16()).dtype == torch.bfloat16


def test_deepcopy_is_independent():
    conv = make().eval()
    x = image()
    before = conv(x)
    other = copy.deepcopy(conv)
    with torch.no_grad():
        other.branches.weight_origin.add_(1)
    assert_fresh(other)
    assert torch.equal(conv(x), before)
    with torch.no_grad():
        conv.branches.weight_origin.sub_(1)
    assert_fresh(conv)
    assert_fresh(other)


@pytest.mark.parametrize('name', list(dict(make().branches.named_parameters())))
@pytest.mark.parametrize('with_grad', [True, False])
def test_write_through_data(name, with_grad):
    """How EMA hooks swap weights, with neither a mode change nor a version count."""
    conv = make().eval()
    parameter = conv.branches.get_parameter(name)
    with torch.set_grad_enabled(with_grad):
        before = conv.kernel()
        own = parameter.data.clone()
        parameter.data.copy_(own * 1.001 + 1e-3)
        swapped = conv.kernel()
        assert not torch.equal(swapped, before)
        assert torch.equal(swapped, afresh(conv))
        parameter.data.copy_(own)
        assert torch.equal(conv.kernel(), before)
    assert_fresh(conv)


def test_exchange_of_data():
    conv = make().eval()
    weight = conv.branches.weight_origin
    assert_fresh(conv)
    for _ in range(5):
        # Freed storage is likely to be handed out again at the same address.
        weight.data = weight.data + 1
        assert_fresh(conv)


def test_small_changes_in_place():
    """One element, which a sample of the tensor may miss and the version shows."""
    conv = make()
    weight = conv.branches.weight_pointwise_kxk_2
    for index in range(0, weight.numel(), 5):
        conv(image())
        with torch.no_grad():
            weight.view(-1)[index] += 1
        assert torch.equal(conv.kernel(), afresh(conv))


def test_exchange_of_parameters():
    conv = make().eval()
    assert_fresh(conv)
    weight = conv.branches.weight_origin
    conv.branches.weight_origin = nn.Parameter(weight.detach() + 1)
    assert_fresh(conv)

    # The same memory, but the gradient belongs to another parameter.
    for _ in range(2):
        conv.branches.weight_origin = nn.Parameter(conv.branches.weight_origin.data)
        conv(image()).sum().backward()
        assert conv.branches.weight_origin.grad is not None


def test_pruning(groups):
    """It replaces the parameter by another one, a mask, and a tensor of both."""
    conv = make().eval()
    assert_fresh(conv)
    prune.l1_unstructured(conv.branches, 'weight_origin', amount=0.5)
    assert_fresh(conv)
    with torch.autocast('cpu', torch.bfloat16):
        kernel = conv.kernel()
    assert torch.equal(kernel, conv.branches())
    prune.remove(conv.branches, 'weight_origin')
    assert (conv.branches.weight_origin == 0).sum() == 6 * (4 // groups) * 9 / 2
    assert_fresh(conv)


@pytest.mark.parametrize('with_grad', [True, False])
def test_parametrisation(with_grad):
    """It frees the parameter that it replaces, unless a graph still holds it."""
    conv = make().eval()
    with torch.set_grad_enabled(with_grad):
        conv(image())
    parametrizations.weight_norm(conv.branches, 'weight_origin')
    assert_fresh(conv)


def test_change_of_a_buffer():
    conv = make().eval()
    assert_fresh(conv)
    conv.branches.filters.mul_(2)
    assert_fresh(conv)


def test_exchanged_branches():
    conv = make()
    assert_fresh(conv)
    other = make().branches
    conv.branches = other
    assert_fresh(conv)
    conv.hold_kernel()
    conv.branches = trained_like(copy.deepcopy(other), seed=2)
    assert torch.equal(conv.hold_kernel(), afresh(conv))


def test_functional_call():
    """The passed tensors serve that call alone, and their gradients are right."""
    conv = make().eval()
    x = image()
    own = conv(x)
    names = [name for name, _ in conv.named_parameters()]
    for shift in (0.1, 0.2):
        values = [(p.detach() + shift).requires_grad_() for p in conv.parameters()]
        y = functional_call(conv, dict(zip(names, values)), (x,))
        twin = copy.deepcopy(conv)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(shift)
        expected = uncached(twin, x)
        assert_near(y, expected, 1e-6)
        assert_near(
            torch.autograd.grad(y.square().sum(), values),
            torch.autograd.grad(expected.square().sum(), list(twin.parameters())),
        )
        assert torch.equal(conv(x), own)


def test_functional_call_with_expanded_tensors():
    """Whose storage is smaller than their shape."""
    conv = make().eval()
    value = torch.ones(1)
    values = {n: value.expand(p.shape) for n, p in conv.named_parameters()}
    x = image()
    y = functional_call(conv, values, (x,))
    value.data.mul_(2)
    # Products of two weights, or three, and a scale.
    assert functional_call(conv, values, (x,)).abs().max() > 3 * y.abs().max()


def test_flips_of_requires_grad():
    conv = make()
    x = image()
    for requires_grad in (True, False, True, False):
        conv.requires_grad_(requires_grad)
        assert conv(x).requires_grad == requires_grad
        assert_fresh(conv)
    weight = conv.branches.weight_origin.requires_grad_()
    conv(x).sum().backward()
    assert weight.grad.any()


def test_moving_between_modes():
    conv = make().eval()
    modes = [torch.no_grad, torch.inference_mode, torch.enable_grad]
    for first in modes:
        for second in modes:
            for mode in (first, second):
                with mode():
                    conv(image())
                with torch.no_grad():
                    conv.branches.weight_origin.add_(0.1)
                with mode():
                    x = image()
                    assert_near(conv(x), uncached(conv, x), 1e-6)
                assert_fresh(conv)


def test_inference_mode_first():
    """Its tensors cannot be saved for a backward pass: the cache must hold none."""
    conv = make()
    with torch.inference_mode():
        conv(image())
    conv.requires_grad_(False)
    with torch.inference_mode():
        conv(image())
    x = image(requires_grad=True)
    conv(x).sum().backward()
    assert x.grad.any()
    conv.requires_grad_(True)
    assert_fresh(conv)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        conv = make().eval()
        x = image()
        assert_near(conv(x), uncached(conv, x), 1e-6)
        conv.branches.weight_origin.add_(1)
        assert_near(conv(x), uncached(conv, x), 1e-6)
    with torch.no_grad():
        assert_near(conv(image() * 0 + 1), uncached(conv, torch.ones(2, 4, 7, 7)), 1e-6)


# Held kernels


def held_gradients(conv, x):
    """Gradients of the branches by way of a held kernel."""
    kernel = conv.hold_kernel()
    y = conv(x)
    assert kernel.is_leaf and conv.kernel() is kernel
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (y * weights.to(y.dtype)).sum().backward()
    assert all(p.grad is None for p in conv.branches.parameters())
    conv.pull_back()
    conv.release_kernel()
    assert kernel.grad is None
    found = {name: p.grad for name, p in conv.named_parameters()}
    conv.zero_grad()
    return found


@pytest.mark.parametrize('k', [1, 3, 7])
def test_held_kernel_passes_on_the_same_gradients(k):
    conv = make(k, bias=True)
    for _ in range(2):
        x = image()
        expected = gradients(uncached(conv, x), conv)
        assert_same_gradients(held_gradients(conv, x), expected)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.add_(0.1)
    assert_fresh(conv)


def test_held_kernel_follows_the_branches():
    """A new value of the branches, a conversion and a copy in the midst of it."""
    conv = make()
    kernel = conv.hold_kernel()
    with counted_folds(conv) as folds:
        conv(image())
        conv(image())
        assert not folds
        with torch.no_grad():
            conv.branches.weight_origin.add_(1)
        conv(image())
        assert len(folds) == 1
    assert torch.equal(kernel, afresh(conv))
    assert conv.hold_kernel() is kernel
    with torch.no_grad():
        assert not conv.kernel().requires_grad
    assert_fresh(copy.deepcopy(conv))
    conv.release_kernel()
    assert_fresh(conv)

    conv.double()
    x = image(dtype=torch.float64)
    expected = gradients(uncached(conv, x), conv)
    assert_same_gradients(held_gradients(conv, x), expected)


@pytest.mark.parametrize(
    'between',
    [
        lambda conv: conv.eval(),
        lambda conv: conv.requires_grad_(False) and conv(image()),
        lambda conv: conv.eval() and conv(image()),
    ],
    ids=['mode', 'frozen for a while', 'evaluated'],
)
def test_held_kernel_between_forward_and_backward(between, monkeypatch):
    """It is not written again while a graph needs it."""
    monkeypatch.setattr(eval_form, '_is_on', True)
    conv = make().train()
    x = image()
    expected = gradients(uncached(conv, x) * 2, conv)
    kernel = conv.hold_kernel()
    loss = (conv(x) * 2).mul(projection(conv(x))).sum()
    with torch.no_grad():
        between(conv)
    conv.train().requires_grad_()
    conv(image())
    loss.backward()
    assert conv.hold_kernel() is kernel
    conv.pull_back()
    assert_same_gradients({n: p.grad for n, p in conv.named_parameters()}, expected)


def addresses(conv):
    return {name: p.grad.data_ptr() for name, p in conv.named_parameters()}


def held_step(conv, x):
    """As :func:`held_gradients`, but adds to the gradients and leaves them there."""
    conv.hold_kernel()
    (conv(x) * projection(conv(x))).sum().backward()
    conv.pull_back()
    conv.release_kernel()


def test_memory_of_gradients_is_used_again(groups):
    """But never while somebody has it."""
    conv = make()
    x = image()
    held_step(conv, x)
    before = addresses(conv)
    once = {name: p.grad.clone() for name, p in conv.named_parameters()}
    conv.zero_grad()
    held_step(conv, x)
    if groups == 1 and compiled.is_available():
        assert addresses(conv) == before
    kept = {name: p.grad for name, p in conv.named_parameters()}
    assert_same_gradients(kept, once)
    view = conv.branches.weight_origin.grad.flatten()
    held_step(conv, x)
    twice = {name: 2 * g for name, g in once.items()}
    assert_same_gradients(kept, twice)
    conv.zero_grad()
    held_step(conv, 3 * x)
    assert_same_gradients(kept, twice)
    del kept
    conv.zero_grad()
    held_step(conv, 3 * x)
    assert_near(view, twice['branches.weight_origin'].flatten())
    conv.zero_grad(set_to_none=False)
    held_step(conv, x)
    found = {name: p.grad for name, p in conv.named_parameters()}
    assert_same_gradients(found, once)


@pytest.mark.parametrize(
    'change',
    [
        lambda conv: conv.to(memory_format=torch.channels_last),
        lambda conv: conv.to(memory_format=torch.channels_last).to(
            memory_format=torch.contiguous_format
        ),
        lambda conv: conv.double(),
        lambda conv: conv.double().float(),
        lambda conv: conv.branches.weight_origin.requires_grad_(False),
        lambda conv: setattr(
            conv.branches,
            'weight_origin',
            nn.Parameter(conv.branches.weight_origin.detach() + 1),
        ),
        lambda conv: setattr(conv, 'branches', copy.deepcopy(conv.branches)),
    ],
)
def test_memory_of_gradients_after_a_change(change):
    conv = make()
    held_step(conv, image())
    old = conv.branches.weight_origin
    old_grad = old.grad.clone()
    change(conv)
    if conv.branches.weight_origin is not old:
        assert torch.equal(old.grad, old_grad)
    conv.zero_grad()
    x = image(dtype=conv.branches.scale.dtype)
    held_step(conv, x)
    found = {n: p.grad for n, p in conv.named_parameters() if p.requires_grad}
    assert all(p.requires_grad or p.grad is None for p in conv.parameters())
    conv.requires_grad_()
    expected = gradients(uncached(conv, x), conv)
    assert_same_gradients(found, {name: expected[name] for name in found})


def test_memory_of_gradients_is_given_back():
    conv = make()
    held_step(conv, image())
    memory = weakref.ref(conv.branches.weight_origin.grad.untyped_storage())
    conv.zero_grad()
    conv.switch_to_deploy()
    assert memory() is None or conv._online_fold._gradient_memory._kept == {}


def test_tied_parameters():
    conv = make()
    conv.branches.weight_average = conv.branches.weight_pointwise
    x = image()
    expected = gradients(uncached(conv, x), conv)
    assert_same_gradients(gradients(conv(x), conv), expected)
    assert_same_gradients(held_gradients(conv, x), expected)


def test_parameters_of_several_precisions():
    conv = make().bfloat16()
    conv.branches.scale.data = conv.branches.scale.data.float()
    x = image(dtype=torch.bfloat16)
    found = held_gradients(conv, x)
    for name, parameter in conv.named_parameters():
        assert found[name].dtype == parameter.dtype
    assert found['branches.scale'].any()


def test_held_kernel_with_nan():
    conv = make()
    with torch.no_grad():
        conv.branches.weight_origin[0] = torch.nan
    conv.hold_kernel()
    (conv(image()) + conv(image())).sum().backward()


@pytest.mark.parametrize('memory_format', [torch.channels_last, None])
def test_gradients_of_a_held_kernel_are_laid_out_as_the_parameters(memory_format):
    """Fused optimizers rely on it."""
    for k in (1, 3, 7):
        conv = make(k)
        if memory_format:
            conv.to(memory_format=memory_format)
        conv.hold_kernel()
        conv(image()).sum().backward()
        conv.pull_back()
        for parameter in conv.parameters():
            assert parameter.grad.stride() == parameter.stride()


def test_held_kernel_of_partly_frozen_branches():
    conv = make()
    conv.branches.scale.requires_grad_(False)
    conv.hold_kernel()
    conv(image()).sum().backward()
    conv.pull_back()
    assert conv.branches.scale.grad is None
    assert conv.branches.weight_origin.grad.any()
    conv.release_kernel()
    assert conv.requires_grad_(False).hold_kernel() is None


# Autograd


def test_two_forwards_then_two_backwards():
    """As generators and discriminators, or two losses, do."""
    conv = make()
    xs = [image(), image()]
    losses = [conv(x).square().sum() for x in xs]
    expected = [uncached(conv, x).square().sum() for x in xs]
    parameters = list(conv.parameters())
    for loss, other in zip(losses, expected):
        assert_near(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad(other, parameters, retain_graph=True),
        )


def test_gradient_accumulation():
    conv = make()
    twin = copy.deepcopy(conv)
    for _ in range(3):
        x = image()
        conv(x).square().sum().backward()
        uncached(twin, x).square().sum().backward()
    for actual, expected in zip(conv.parameters(), twin.parameters()):
        assert_near(actual.grad, expected.grad)


def test_retain_graph():
    conv = make()
    loss = conv(image()).square().sum()
    parameters = list(conv.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert_near(second, first, 1e-7)


def test_gradient_penalty_on_the_input():
    """A second derivative that passes through the kernel once."""
    conv = make()
    x = image(requires_grad=True)

    def penalty(y):
        (grad,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        return gradients(grad.square(), conv)

    assert_same_gradients(penalty(conv(x)), penalty(uncached(conv, x)))


@pytest.mark.parametrize(
    'change',
    [
        lambda conv: conv.branches.weight_origin.detach().add_(1),
        lambda conv: conv.branches.filters.mul_(2),
        lambda conv: conv.load_state_dict(filled(conv, 0.1)),
        lambda conv: torch.optim.SGD(conv.parameters(), lr=0.1).step(),
    ],
    ids=['parameter', 'buffer', 'load_state_dict', 'optimizer'],
)
def test_change_between_forward_and_backward(change):
    conv = make()
    conv(image()).sum().backward()
    loss = conv(image()).sum()
    change(conv)
    with pytest.raises(RuntimeError, match='changed in place between the forward and'):
        loss.backward()
    # The next step is as any other.
    assert_fresh(conv)


@pytest.mark.parametrize('backward_inside', [False, True])
def test_autocast(backward_inside, groups):
    conv = make()
    x = image(requires_grad=True)
    with counted_folds(conv) as folds:
        with torch.autocast('cpu', torch.bfloat16):
            y = conv(x)
            if backward_inside:
                actual = gradients(y, conv)
        if not backward_inside:
            actual = gradients(y, conv)
    assert y.dtype == torch.bfloat16
    assert folds == [torch.float32] * groups
    assert conv.kernel().dtype == torch.float32
    assert torch.equal(conv.kernel(), afresh(conv))

    # The convolution is rounded to bfloat16, the fold and its gradient are not.
    kernel = conv.branches().detach().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        y = F.conv2d(x, kernel, padding=1, groups=groups)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((y * weights.to(y.dtype)).sum(), kernel)
    names, parameters = zip(*conv.named_parameters())
    expected = torch.autograd.grad(conv.branches(), parameters, grad)
    assert_same_gradients(actual, dict(zip(names, expected)), 1e-6)


def test_half_precision_parameters_fold_in_float32():
    conv = make().bfloat16()
    with counted_folds(conv) as folds:
        y = conv(image(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and folds == [torch.float32]
    wide = copy.deepcopy(conv).float()
    assert torch.equal(conv.kernel(), wide.kernel().bfloat16())
    actual = gradients(conv.kernel(), conv)
    assert all(grad.dtype == torch.bfloat16 for grad in actual.values())
    assert_same_gradients(actual, gradients(wide.branches(), wide), 2e-2)


@pytest.mark.parametrize('k', [1, 3, 7])
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compile(backend, k):
    torch.compiler.reset()
    conv = trained_like(
        OREPAConv2d(4, 6, k, padding=k // 2, norm_cfg=dict(type='BN'))
    ).eval()
    compiled = torch.compile(conv, backend=backend, fullgraph=True)
    for _ in range(2):
        x = image()
        y = compiled(x)
        assert_near(y, conv(x))
        assert_same_gradients(gradients(y, conv), gradients(conv(x), conv), 1e-4)
        with torch.no_grad():
            assert_near(compiled(x), conv(x))
            conv.branches.get_parameter('scale' if k < 7 else 'factors.0.scale').mul_(2)
    torch.compiler.reset()


@pytest.mark.parametrize('cached', [True, False])
@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpoint(use_reentrant, cached):
    """Two checkpointed passes through the same convs, and one that is not."""
    first = OREPAConv2d(4, 4, 3, padding=1, norm_cfg=dict(type='BN'))
    second = OREPAConv2d(4, 4, 3, padding=1, groups=2)
    net = trained_like(nn.Sequential(first, nn.ReLU(), second)).eval()
    x = image(requires_grad=True)
    net(net(net(x))).square().sum().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    if not cached:
        net.train().eval()

    y = checkpoint(net, x, use_reentrant=use_reentrant)
    y = net(checkpoint(net, y, use_reentrant=use_reentrant))
    y.square().sum().backward()
    assert_same_gradients({n: p.grad for n, p in net.named_parameters()}, expected)


WRAPPERS = {
    'ddp': DistributedDataParallel,
    'fsdp': partial(FullyShardedDataParallel, device_id=torch.device('cpu')),
    'fsdp_orig_params': partial(
        FullyShardedDataParallel, use_orig_params=True, device_id=torch.device('cpu')
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_distributed_training(wrapper, tmp_path):
    """DDP puts hooks on parameters, FSDP puts views of another one in their place."""
    store = f'file://{tmp_path}/store'
    torch.distributed.init_process_group('gloo', store, rank=0, world_size=1)
    try:
        conv = make()
        conv(image())
        twin = copy.deepcopy(conv)
        model = WRAPPERS[wrapper](conv)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin)]
        for _ in range(3):
            x = image()
            y, expected = model(x), uncached(twin, x)
            assert_near(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


def test_ema_of_mmengine():
    from mmengine.model import ExponentialMovingAverage

    conv = make().train()
    conv(image())
    ema = ExponentialMovingAverage(conv, momentum=0.5).eval()
    for _ in range(3):
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update_parameters(conv)
        assert_fresh(ema.module)
        assert_fresh(conv)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.enable_grad])
def test_trace(mode):
    """How MMEngine counts parameters and operations."""
    conv = make().eval()
    with mode():
        conv(image())
        traced = torch.jit.trace(conv, image())
        x = image()
        assert_near(traced(x), conv(x))


def test_meta_device():
    with torch.device('meta'):
        conv = OREPAConv2d(4, 6, 3, norm_cfg=dict(type='BN'))
        x = image()
    y = conv(x)
    assert y.is_meta and y.shape == (2, 6, 5, 5)
    y.sum().backward()
    with torch.no_grad():
        assert conv.eval()(x).shape == (2, 6, 5, 5)
    conv.switch_to_deploy()
    assert conv.weight.is_meta


def test_no_warnings():
    """The fold is silent."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert_fresh(make())


def test_second_derivatives_of_the_parameters_say_that_there_are_none():
    conv = make()
    loss = conv(image()).square().sum()
    (grad,) = torch.autograd.grad(loss, conv.branches.weight_origin, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiate twice'):
        grad.sum().backward()
