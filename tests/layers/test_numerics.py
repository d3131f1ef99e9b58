"""Low precision, and numbers at the edges of what float32 holds."""

import copy

import pytest
import torch
from helpers import assert_near, deployed_twin, trained_like
from test_online_folding import CONVS, FOLDED, image

HALF = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
KERNELS = [name for name in FOLDED if name != 'orepa_repvgg']


def make(kind='3x3'):
    return trained_like(CONVS[kind]()).eval()


def in_float64(conv, x):
    return copy.deepcopy(conv).double()(x.double())


@pytest.mark.parametrize('kind', KERNELS)
@pytest.mark.parametrize('dtype', HALF)
class TestAutocast:
    def test_fold(self, kind, dtype):
        """As close to float64 as float32 comes, and not as half precision does."""
        conv = make(kind)
        expected = copy.deepcopy(conv).double().kernel()
        with torch.autocast('cpu', dtype):
            found = conv.kernel()
        assert found.dtype == torch.float32
        assert_near(found, expected, 1e-6)

    def test_gradients_of_the_fold(self, kind, dtype):
        conv = make(kind)
        wide = copy.deepcopy(conv).double()
        direction = torch.randn(conv.kernel().shape)
        with torch.autocast('cpu', dtype):
            kernel = conv.kernel()
        kernel.backward(direction)
        wide.kernel().backward(direction.double())
        for found, expected in zip(
            conv.branches.parameters(), wide.branches.parameters()
        ):
            assert found.grad.dtype == torch.float32
            assert_near(found.grad, expected.grad, 1e-5)

    def test_weights_in_half_precision(self, kind, dtype):
        """One rounding, of the result."""
        conv = make(kind).to(dtype)
        expected = copy.deepcopy(conv).double().kernel()
        error = (conv.kernel().double() - expected).abs()
        # Below the smallest normal number, steps are as large as there.
        steps = expected.abs().clamp_min(torch.finfo(dtype).tiny)
        # And what float32 adds, before it.
        assert (error <= 1.01 * HALF[dtype] * steps + 1e-6 * expected.abs().max()).all()


@pytest.mark.parametrize('dtype', HALF)
def test_deployed_in_half_precision(dtype):
    """A network of 18 convs, against its float32 twin: as documented."""
    from mmorepa.backbones import OREPAResNet

    model = trained_like(OREPAResNet(depth=18, base_channels=16)).eval()
    plain = deployed_twin(model)
    x = torch.randn(2, 3, 64, 64)
    (*_, expected) = plain(x)
    (*_, found) = copy.deepcopy(plain).to(dtype)(x.to(dtype))
    error = (found.float() - expected).norm() / expected.norm()
    assert HALF[dtype] / 100 < error < 4 * HALF[dtype]


EDGES = {
    'no variance': dict(running_var=0.0),
    'tiny variance': dict(running_var=1e-12),
    'denormal variance': dict(running_var=1e-40),
    'large variance': dict(running_var=1e30),
    'no gamma': dict(weight=0.0),
    'denormal gamma': dict(weight=1e-40),
    'large gamma': dict(weight=1e20),
    'large mean': dict(running_mean=1e6),
    'large beta': dict(bias=1e20),
}


@pytest.mark.parametrize('every', [False, True])
@pytest.mark.parametrize('edge', EDGES)
def test_batch_norm_at_the_edge(edge, every):
    """In one channel, or in all: no worse than the training form by itself is."""
    conv = make()
    for name, value in EDGES[edge].items():
        getattr(conv.norm, name).data[None if every else slice(1)] = value
    x = image()
    expected = in_float64(conv, x)
    found = deployed_twin(conv)(x)
    assert found.isfinite().all()
    for channel in range(6):
        wanted, own = expected[:, channel], conv(x)[:, channel]
        scale = wanted.abs().max()
        error = (found[:, channel] - wanted).abs().max()
        own_error = (own - wanted).abs().max()
        assert error <= max(1e-6 * scale, 4 * own_error)


@pytest.mark.parametrize('scale', [1e-18, 1e-12, 1e12])
@pytest.mark.parametrize('kind', ['3x3', '1x1', 'grouped'])
def test_weights_of_any_size(kind, scale):
    """Products of two of them, and sums of those, still fit."""
    conv = make(kind)
    for parameter in conv.branches.parameters():
        parameter.data *= scale
    x = image()
    expected = in_float64(conv, x)
    assert_near(copy.deepcopy(conv).double().kernel(), conv.kernel().double(), 1e-5)
    assert_near(deployed_twin(conv)(x), expected, 1e-5)


def test_overflow_shows():
    """It is not turned into a number."""
    conv = make()
    for parameter in conv.branches.parameters():
        parameter.data *= 1e25
    assert not conv.kernel().isfinite().all()
