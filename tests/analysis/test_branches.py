import math

import pytest
import torch
from helpers import assert_near, deployed_twin, trained_like

from mmorepa.analysis import branch_kernels, cosine_similarities, relative_step, shares
from mmorepa.layers import (
    DBBConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    PlainConv2d,
    RepVGGConv2d,
)

NORM = dict(norm_cfg=dict(type='BN'), bias=False)
CONVS = {
    'orepa': lambda: OREPAConv2d(6, 8, 3, padding=1, **NORM),
    'orepa 1x1': lambda: OREPAConv2d(6, 8, 1, **NORM),
    'orepa, no norm': lambda: OREPAConv2d(6, 8, 3, padding=1),
    'orepa, groups': lambda: OREPAConv2d(8, 8, 5, padding=2, groups=2, **NORM),
    'dbb': lambda: DBBConv2d(6, 8, 3, padding=1, bias=False),
    'repvgg': lambda: RepVGGConv2d(8, 8, 3, padding=1, bias=False),
    'orepa repvgg': lambda: OREPARepVGGConv2d(8, 8, 3, padding=1, bias=False),
}


def folded(layer):
    return sum(layer.kernels.values())


@pytest.mark.parametrize('name', CONVS)
def test_branches_add_up_to_the_deployed_kernel(float64, name):
    conv = trained_like(CONVS[name]()).eval()
    (layer,) = branch_kernels(conv)
    assert_near(folded(layer), deployed_twin(conv).weight.detach(), 1e-12)
    assert layer.kernels.keys() == layer.scales.keys()
    assert all(scale.shape == (8,) for scale in layer.scales.values())
    found = shares(layer.kernels)
    for kind in ('size', 'projection'):
        assert sum(getattr(share, kind) for share in found.values()) == pytest.approx(1)
    assert min(share.size for share in found.values()) > 0


def test_in_single_precision():
    """What a training can afford is what the float64 fold says, but for rounding."""
    conv = trained_like(CONVS['orepa']())
    (wide,), (narrow,) = branch_kernels(conv), branch_kernels(conv, torch.float32)
    assert folded(narrow).dtype == torch.float32
    assert_near(folded(narrow), folded(wide).float())


def test_factors_of_a_deep_linear_conv(float64):
    conv = trained_like(OREPAConv2d(3, 4, 7, padding=3, **NORM))
    layers = branch_kernels(torch.nn.Sequential(conv))
    assert [layer.name for layer in layers] == ['0.1', '0.2', '0.3']
    for layer, factor in zip(layers, conv.branches.factors):
        assert_near(folded(layer), factor().detach(), 1e-12)


def test_what_has_one_branch_or_none_is_left_out():
    network = torch.nn.Sequential(
        PlainConv2d(3, 4, 3),
        OREPAConv2d(4, 4, 3, branches=['origin']),
        OREPAConv2d(4, 4, 3, deploy=True),
        torch.nn.Conv2d(4, 4, 3),
        OREPAConv2d(4, 4, 3),
    )
    assert [layer.name for layer in branch_kernels(network)] == ['4']


def test_cosines(float64):
    first, other = torch.randn(2, 4, 3, 3, 3)
    other -= (
        first
        * (first * other).sum((1, 2, 3), True)
        / first.square().sum((1, 2, 3), True)
    )
    kernels = dict(a=first, b=-2 * first, c=other, d=torch.zeros_like(first))
    found = cosine_similarities(kernels)
    expected = torch.eye(3)
    expected[0, 1] = expected[1, 0] = -1
    torch.testing.assert_close(found[:3, :3], expected)
    assert found[3].isnan().all() and found[:, 3].isnan().all()


def test_shares(float64):
    kernel = torch.randn(4, 3, 3, 3)
    found = shares(dict(a=3 * kernel, b=-kernel))
    assert found['a'] == pytest.approx((0.75, 1.5))
    assert found['b'] == pytest.approx((0.25, -0.5))
    nothing = shares(dict(a=0 * kernel, b=0 * kernel))
    assert math.isnan(nothing['a'].size)


def test_the_scale_of_an_output_channel_changes_nothing(float64):
    kernels = dict(zip('abc', torch.randn(3, 4, 3, 3, 3)))
    factors = torch.tensor([1e6, 1.0, -1e-3, 2.0])[:, None, None, None]
    scaled = {name: kernel * factors for name, kernel in kernels.items()}
    torch.testing.assert_close(
        cosine_similarities(scaled), cosine_similarities(kernels)
    )
    for name, share in shares(scaled).items():
        assert share == pytest.approx(shares(kernels)[name])
    one, other = kernels['a'], kernels['a'] + 0.01 * kernels['b']
    assert relative_step(one * factors, other * factors) == pytest.approx(
        relative_step(one, other), rel=1e-4
    )


def test_relative_step():
    kernel = torch.randn(4, 3, 3, 3)
    assert relative_step(kernel, 1.25 * kernel) == pytest.approx(0.25, rel=1e-5)
    kernel[0] = 0
    assert relative_step(kernel, 1.25 * kernel) == pytest.approx(0.25, rel=1e-5)
    assert relative_step(torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)) == 0
