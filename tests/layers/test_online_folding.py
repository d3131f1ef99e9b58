"""Unheld, every forward pass folds: whatever happens to a parameter is seen."""

import copy

import pytest
import torch
from helpers import (
    assert_near,
    assert_same_gradients,
    deployed_twin,
    gradients,
    trained_like,
)
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mmorepa
from mmorepa.functional import BranchSum, compiled
from mmorepa.layers import (
    DBBConv2d,
    DeepLinearConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    RepVGGConv2d,
)

BN = dict(type='BN')
CONVS = {
    '3x3': lambda: OREPAConv2d(4, 6, 3, padding=1, norm_cfg=BN),
    '5x5': lambda: OREPAConv2d(4, 6, 5, padding=2),
    '1x1': lambda: OREPAConv2d(4, 6, 1, norm_cfg=BN),
    '7x7': lambda: OREPAConv2d(4, 6, 7, padding=3, bias=False, norm_cfg=BN),
    'grouped': lambda: OREPAConv2d(4, 6, 3, padding=1, groups=2),
    'deep_linear': lambda: DeepLinearConv2d(4, 6, 5, padding=2),
    'dbb': lambda: DBBConv2d(4, 6, 3, padding=1),
    'repvgg': lambda: RepVGGConv2d(4, 4, 3, padding=1),
    'orepa_repvgg': lambda: OREPARepVGGConv2d(4, 4, 3, padding=1),
}
FOLDED = [name for name in CONVS if name not in ('dbb', 'repvgg')]


def image(**kwargs):
    return torch.randn(2, 4, 7, 7, **kwargs)


@pytest.fixture(params=CONVS)
def conv(request, float64):
    return trained_like(CONVS[request.param]()).eval()


@pytest.fixture(params=FOLDED)
def folded_conv(request, float64):
    return trained_like(CONVS[request.param]()).eval()


@pytest.fixture
def by_formulas(monkeypatch):
    """Turns a conv into one whose fold is differentiated term by term."""

    def turn(conv):
        for module in conv.modules():
            if isinstance(getattr(module, 'branch_sum', None), BranchSum):
                module.forward = lambda m=module: m.branch_sum.kernel(*m.tensors())
        return conv

    return turn


def test_every_element_is_seen(conv):
    """Those of tensors of a few and of many elements, written past autograd."""
    x = image()
    with torch.no_grad():
        for name, parameter in conv.named_parameters():
            if not parameter.requires_grad:
                continue
            flat = parameter.data.view(-1)
            for i in range(0, flat.numel(), 1 + flat.numel() // 16):
                before = conv(x)
                flat[i] += 0.5
                after = conv(x)
                changed = not torch.equal(before, after)
                assert changed, f'{name}[{i}] is not seen'
    assert_near(conv(x), deployed_twin(conv)(x), 1e-12)


def test_gradients(folded_conv, by_formulas):
    x = image()
    twin = by_formulas(copy.deepcopy(folded_conv))
    y, expected = folded_conv(x), twin(x)
    assert_near(y, expected, 1e-12)
    assert_same_gradients(gradients(y, folded_conv), gradients(expected, twin), 1e-11)


def test_second_derivatives(folded_conv, by_formulas):
    x = image()
    found = []
    for conv in (folded_conv, by_formulas(copy.deepcopy(folded_conv))):
        parameters = list(conv.parameters())
        first = torch.autograd.grad(
            conv(x).square().sum(), parameters, create_graph=True
        )
        loss = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(loss, parameters))
    for one, other in zip(*found):
        assert_near(one, other, 1e-10)


def test_transforms(folded_conv):
    """``torch.func`` and forward-mode derivatives, against plain backward passes."""
    conv, x = folded_conv, image()
    state = {name: p.detach() for name, p in conv.named_parameters()}

    def loss(state, x):
        return functional_call(conv, state, (x,)).square().sum()

    conv.zero_grad()
    conv(x).square().sum().backward()
    expected = {name: p.grad for name, p in conv.named_parameters()}
    assert_same_gradients(grad(loss)(state, x), expected, 1e-11)

    each = vmap(grad(loss), (None, 0))(state, x[:, None])
    assert_same_gradients({n: g.sum(0) for n, g in each.items()}, expected, 1e-11)

    direction = {name: torch.randn_like(p) for name, p in state.items()}
    wanted = sum((expected[name] * d).sum() for name, d in direction.items())
    _, slope = jvp(lambda s: loss(s, x), (state,), (direction,))
    assert_near(slope, wanted, 1e-10)
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, direction[n]) for n, p in state.items()}
        slope = forward_ad.unpack_dual(loss(duals, x)).tangent
    assert_near(slope, wanted, 1e-10)

    scaled = {name: torch.stack([p, 1.1 * p]) for name, p in state.items()}
    several = vmap(loss, (0, None))(scaled, x)
    assert_near(several[0], loss(state, x), 1e-12)


def test_other_parameters_in_a_call(folded_conv):
    """They are gone when the backward pass comes, which may fold again."""
    conv, x = folded_conv, image()
    state = {n: (1.1 * p).detach().requires_grad_() for n, p in conv.named_parameters()}
    y = functional_call(conv, state, (x,))
    weights = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    found = torch.autograd.grad((y * weights).sum(), list(state.values()))
    conv.load_state_dict(state, strict=False)
    expected = gradients(conv(x), conv)
    assert_same_gradients(dict(zip(state, found)), expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize('kind', FOLDED)
def test_compiled_by_pytorch(kind):
    conv = trained_like(CONVS[kind]()).eval()
    x = image()
    torch._dynamo.reset()
    function = torch.compile(conv, backend='aot_eager', fullgraph=True)
    assert_near(function(x), conv(x))
    with torch.no_grad():
        next(conv.branches.parameters()).mul_(2)
    assert_near(function(x), conv(x))
    assert_same_gradients(gradients(function(x), conv), gradients(conv(x), conv))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointed(folded_conv, use_reentrant):
    x = image(requires_grad=True)
    expected = gradients(folded_conv(x), folded_conv)
    folded_conv.zero_grad()
    y = checkpoint(folded_conv, x, use_reentrant=use_reentrant)
    weights = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    (y * weights).sum().backward()
    found = {name: p.grad for name, p in folded_conv.named_parameters()}
    assert_same_gradients(found, expected, 1e-12)


def test_traces_see_the_formulas(conv):
    """A kernel is no constant of a trace, so that parameters may change after it."""
    x = image()
    traced = torch.jit.trace(conv, x, check_trace=False)
    try:
        symbolic = torch.fx.symbolic_trace(conv)
    except torch.fx.proxy.TraceError:
        symbolic = None  # DBB looks at sizes of its input.
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(1.1)
        expected = conv(x)
        assert_near(traced(x), expected, 1e-12)
        if symbolic is not None:
            used = {n.target for n in symbolic.graph.nodes if n.op == 'get_attr'}
            names = {name for name, _ in conv.branches.named_parameters()}
            if names and not isinstance(conv, (DBBConv2d, RepVGGConv2d)):
                assert {n.removeprefix('branches.') for n in used} >= names
            assert_near(symbolic(x), expected, 1e-12)


def test_built_on_meta(conv):
    """Nothing but what is saved has to be filled in."""
    kind = next(k for k, build in CONVS.items() if repr(build()) == repr(conv))
    with torch.device('meta'):
        twin = CONVS[kind]()
    twin.to_empty(device='cpu')
    for tensor in twin.state_dict().values():
        tensor.fill_(7)
    twin.load_state_dict(conv.state_dict())
    x = image()
    assert_near(twin.eval()(x), conv(x), 1e-12)


class Reads(TorchDispatchMode):
    """Lists the operations that wait for a device."""

    NAMES = ('equal', '_local_scalar_dense', 'is_nonzero', 'nonzero', 'item')

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in self.NAMES:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('with_compiled', [True, False])
def test_nothing_is_read_from_the_device(conv, with_compiled, monkeypatch):
    if not with_compiled:
        monkeypatch.setattr(compiled, 'is_available', lambda: False)
    with Reads() as reads:
        torch.zeros(1).item()
        assert reads.found, 'the counter counts'
        reads.found.clear()
        conv.train()(image()).sum().backward()
        conv.eval()
        with torch.no_grad():
            conv(image())
            with mmorepa.folded(conv):
                conv(image())
                conv(image())
    assert not reads.found
