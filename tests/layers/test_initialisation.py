"""What every weight of every block starts with, by its statistics."""

import math

import pytest
import torch
from helpers import assert_near, trained_like
from torch import nn

from mmorepa.backbones import OREPAResNet
from mmorepa.layers import (
    DBBConv2d,
    DeepLinearConv2d,
    OREPAConv2d,
    OREPAPointwiseKernel,
    OREPARepVGGConv2d,
    PlainConv2d,
    RepVGGConv2d,
)

NORM = dict(bias=False, norm_cfg=dict(type='BN'))
# The scales of the linear branches at the start, in the order of the rows.
SCALES_3X3 = {
    'origin': 0.25,
    'average': 0.25,
    'frequency': 0.0,
    'pointwise_kxk': 0.5,
    'pointwise': 1.0,
    'depthwise_separable': 0.5,
}


def assert_uniform(weight, bound):
    """Uniform between -bound and bound: by extremes, mean and variance."""
    values = weight.detach().double().flatten()
    count = len(values)
    assert count > 100, 'too few to tell'
    assert values.abs().max() <= bound * (1 + 1e-6)
    # The largest of n is expected at n / (n + 1), the chance of less is e^-20 here.
    assert values.max() > bound * (1 - 40 / count)
    assert values.min() < -bound * (1 - 40 / count)
    variance = bound**2 / 3
    assert abs(values.mean()) < 5 * math.sqrt(variance / count)
    # The fourth moment of a uniform distribution is 1.8 times its squared variance.
    error = (values.square().mean() - variance).abs()
    assert error < 5 * variance * math.sqrt(0.8 / count)


def assert_normal(weight, std):
    values = weight.detach().double().flatten()
    count = len(values)
    assert count > 100, 'too few to tell'
    assert values.abs().max() > 2.5 * std, 'bounded as no normal distribution is'
    assert abs(values.mean()) < 5 * std / math.sqrt(count)
    error = (values.square().mean() - std**2).abs()
    assert error < 5 * std**2 * math.sqrt(2 / count)


def kaiming(fan_in, a):
    return math.sqrt(6 / ((1 + a**2) * fan_in))


def assert_rows(scale, values):
    assert scale.shape[0] == len(values)
    for row, value in zip(scale, values):
        assert torch.equal(row, torch.full_like(row, value))


def check_kernel(kernel, inputs, groups, a, names, size=3):
    """The weights of section 1, with the branches ``names``."""
    own, taps = inputs // groups, size**2
    hidden = inputs if groups <= 4 else 2 * inputs
    outputs = kernel.scale.shape[1]
    shapes = {
        'weight_origin': ((outputs, taps, own), own * taps),
        'weight_average': ((outputs, own, 1, 1), own),
        'weight_frequency': ((outputs, own, 1, 1), own),
        'weight_pointwise_kxk_2': (
            (outputs, taps, hidden // groups),
            hidden // groups * taps,
        ),
        'weight_pointwise': ((outputs, own, 1, 1), own),
        'weight_depthwise': ((8, taps, inputs), taps),
        'weight_separable': ((outputs, 8, own), 8 * own),
    }
    if 'pointwise' not in names:
        del shapes['weight_pointwise']
    zeros = 'weight_pointwise_kxk_1'
    assert {n for n, _ in kernel.named_parameters()} == {*shapes, zeros, 'scale'}
    for name, (shape, fan_in) in shapes.items():
        weight = getattr(kernel, name)
        assert weight.shape == shape
        assert_uniform(weight, kaiming(fan_in, a))
    first = getattr(kernel, zeros)
    assert first.shape == (hidden, own, 1, 1)
    assert not first.any()
    assert_rows(kernel.scale, [SCALES_3X3[name] for name in names])


def check_norm(norm, weight=1.0):
    for tensor, value in (
        (norm.weight, weight),
        (norm.bias, 0.0),
        (norm.running_mean, 0.0),
        (norm.running_var, 1.0),
    ):
        assert torch.equal(tensor, torch.full_like(tensor, value))


class TestOREPA:
    @pytest.mark.parametrize(
        ('groups', 'size'), [(1, 3), (4, 3), (8, 3), (32, 3), (1, 5)]
    )
    def test_kxk(self, groups, size):
        conv = OREPAConv2d(64, 96, size, groups=groups, **NORM)
        check_kernel(conv.branches, 64, groups, 0.0, list(SCALES_3X3), size)
        check_norm(conv.norm)

    def test_large(self):
        conv = OREPAConv2d(48, 64, 7, **NORM)
        first, *others = conv.branches.factors
        assert len(others) == 2
        check_kernel(first, 48, 1, 0.0, list(SCALES_3X3))
        for factor in others:
            check_kernel(factor, 64, 1, 0.0, list(SCALES_3X3))
        norms = [m for m in conv.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms == [conv.norm]
        check_norm(conv.norm)

    @pytest.mark.parametrize('groups', [1, 2])
    @pytest.mark.parametrize('channels', [(16, 32), (32, 16), (32, 32)])
    def test_pointwise(self, channels, groups):
        inputs, outputs = channels
        kernel = OREPAPointwiseKernel(outputs, inputs, groups)
        identity, random = kernel.weight_first, kernel.weight_second
        if outputs <= inputs:
            identity, random = random, identity
        for weight in (kernel.weight_origin, random):
            assert_uniform(weight, kaiming(weight[0].numel(), 1.0))
        x = torch.randn(1, min(channels), 2, 2)
        assert torch.equal(nn.functional.conv2d(x, identity, groups=groups), x)
        assert identity.requires_grad
        assert_rows(kernel.scale, [1.0, 0.5])

    @pytest.mark.parametrize('groups', [1, 8])
    def test_dense_branch_of_repvgg(self, groups):
        conv = OREPARepVGGConv2d(64, 64, 3, padding=1, groups=groups)
        dense = conv.branches['origin']
        names = [name for name in SCALES_3X3 if name != 'pointwise']
        check_kernel(dense.branches, 64, groups, 1.0, names)
        for branch in conv.branches.values():
            check_norm(branch.norm)
        assert_normal(conv.branches['pointwise'].branches.weight, math.sqrt(2 / 64))


class TestBaselines:
    @pytest.mark.parametrize(('size', 'groups'), [(1, 1), (3, 1), (3, 4), (7, 1)])
    def test_plain(self, size, groups):
        """As OpenMMLab's ResNets: Kaiming's normal distribution, fan-out, ReLU."""
        conv = PlainConv2d(32, 64, size, groups=groups, **NORM)
        assert_normal(conv.branches.weight, math.sqrt(2 / (64 * size**2)))
        check_norm(conv.norm)

    def test_repvgg(self):
        conv = RepVGGConv2d(64, 64, 3, padding=1)
        assert_normal(conv.branches['origin'].branches.weight, math.sqrt(2 / 576))
        assert_normal(conv.branches['pointwise'].branches.weight, math.sqrt(2 / 64))
        for branch in conv.branches.values():
            check_norm(branch.norm)

    def test_dbb(self):
        conv = DBBConv2d(32, 64, 3, padding=1)
        convs = {
            'origin': (conv.branches['origin'], 9),
            'pointwise': (conv.branches['pointwise'], 1),
            'average': (conv.branches['average'].first, 1),
            'pointwise_kxk': (conv.branches['pointwise_kxk'].second, 9),
        }
        for module, taps in convs.values():
            assert_normal(module.branches.weight, math.sqrt(2 / (64 * taps)))
        first = conv.branches['pointwise_kxk'].first
        assert not first.branches.weight.any()
        assert torch.equal(first.kernel()[:, :, 0, 0], torch.eye(32))
        norms = [m for m in conv.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 6
        for norm in norms:
            check_norm(norm)


def scales_of(module):
    return {name: value for name, value in module.named_parameters() if 'scale' in name}


class TestOptions:
    """Arguments of the blocks, here through the networks that hand them on."""

    def test_single_init(self):
        net = OREPAResNet(50, base_channels=8, block_cfg=dict(single_init=True))
        found = scales_of(net)
        # The stem's three, and three convs a block and four projections.
        assert len(found) == 3 + 16 * 3 + 4
        for scale in found.values():
            assert_rows(scale, [1.0] + [0.0] * (len(scale) - 1))

    def test_scales_over_single_init(self):
        scales = dict(average=0.5, origin=0.75)
        options = dict(bias=False, single_init=True, initial_scales=scales)
        conv = OREPAConv2d(8, 8, 3, **options)
        assert_rows(conv.branches.scale, [0.75, 0.5, 0, 0, 0, 0])


class TestBranches:
    """The folded result is the sum of the branches that were chosen."""

    @pytest.mark.parametrize(
        ('kind', 'names'),
        [
            *((DBBConv2d, [name]) for name in DBBConv2d.BRANCH_NAMES),
            (DBBConv2d, ['average', 'origin']),
            *((RepVGGConv2d, [name]) for name in RepVGGConv2d.BRANCH_NAMES),
            (RepVGGConv2d, ['identity', 'origin']),
            (OREPARepVGGConv2d, ['origin']),
            (OREPARepVGGConv2d, ['pointwise', 'origin']),
        ],
    )
    @torch.no_grad()
    def test_on_the_feature_map(self, kind, names):
        whole = trained_like(kind(8, 8, 3, padding=1, bias=False)).eval()
        conv = kind(8, 8, 3, padding=1, bias=False, branches=names).eval()
        own = conv.state_dict().keys()
        conv.load_state_dict(
            {k: v for k, v in whole.state_dict().items() if k in own}, strict=True
        )
        assert set(conv.branches) == set(names)
        x = torch.randn(2, 8, 9, 7)
        expected = sum(whole.branches[name](x) for name in names)
        assert_near(conv(x), expected, 1e-5)
        conv.switch_to_deploy()
        assert_near(conv(x), expected, 1e-5)


@pytest.mark.parametrize('kind', [OREPAConv2d, DeepLinearConv2d])
@pytest.mark.parametrize('size', [9, 13, 21, 31])
@pytest.mark.parametrize('groups', [1, 8])
def test_large_kernels(kind, size, groups):
    """They start as large as a plain conv's, and every factor learns."""
    conv = kind(8, 8, size, padding=size // 2, groups=groups, bias=False)
    out = conv(torch.randn(1, 8, 24, 24))
    assert 0.2 < out.std() < 1
    out.square().mean().backward()
    for factor in conv.branches.factors:
        moved = max(p.grad.norm() for p in factor.parameters())
        assert 1e-4 < moved < 1e2
    assert conv.half().kernel().abs().max() < 1


def test_draws_from_another_generator():
    """As on a GPU: convs of one shape get branches of their own."""
    convs = [OREPAConv2d(4, 4, 3, **NORM) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for conv in convs:
        conv.branches.weight_origin.data.add_(1)  # Not fresh any more.
        conv.weight.data.normal_(generator=generator)
    one, other = (conv.branches.weight_origin for conv in convs)
    assert not one.equal(other)
