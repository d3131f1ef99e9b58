"""The kernel that decays, against formulas that are written down a second time."""

import pytest
import torch
from helpers import assert_near, trained_like

from mmorepa.layers import (
    DBBConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    PlainConv2d,
    RepVGGConv2d,
    switch_to_deploy,
)

pytestmark = pytest.mark.usefixtures('float64')
BN = dict(type='BN')


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)


def assert_same_loss(conv, expected, trained):
    """The squared norm, and its gradients by the parameters ``trained``.

    No other parameter gets a gradient: BatchNorm is held constant.
    """
    actual = conv.regularized_kernel().square().sum()
    assert_near(actual, expected, 1e-12)
    found = gradients(actual, trained)
    for one, other in zip(found, gradients(expected, trained)):
        assert_near(one, other, 1e-11)
    chosen = {id(parameter) for parameter in trained}
    others = [p for p in conv.parameters() if id(p) not in chosen]
    assert all(g is None for g in gradients(conv.regularized_kernel().sum(), others))


def custom_l2(kernel_3, norm_3, kernel_1, norm_1):
    """RepVGG's get_custom_L2(), after Ding et al., CVPR 2021."""

    def scale(norm):
        std = (norm.running_var + norm.eps).sqrt()
        return (norm.weight / std).reshape(-1, 1, 1, 1).detach()

    t3, t1 = scale(norm_3), scale(norm_1)
    centre = kernel_3[:, :, 1:2, 1:2]
    circle = kernel_3.square().sum() - centre.square().sum()
    merged = centre * t3 + kernel_1 * t1
    return circle + (merged.square() / (t3.square() + t1.square())).sum()


SHAPES = [
    dict(in_channels=6, out_channels=6),  # with an identity branch
    dict(in_channels=6, out_channels=6, stride=2),
    dict(in_channels=4, out_channels=6, groups=2),
]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_repvgg(shape):
    conv = trained_like(RepVGGConv2d(kernel_size=3, padding=1, **shape))
    assert ('identity' in conv.branches) == (shape == SHAPES[0])
    dense, pointwise = conv.branches['origin'], conv.branches['pointwise']
    # A sign of γ that is not that of the other must not matter.
    with torch.no_grad():
        dense.norm.weight[0] *= -1
    kernels = dense.branches.weight, pointwise.branches.weight
    expected = custom_l2(kernels[0], dense.norm, kernels[1], pointwise.norm)
    assert_same_loss(conv, expected, kernels)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_orepa_repvgg(shape):
    """The same with the folded kernel in the place of the dense one."""
    conv = trained_like(OREPARepVGGConv2d(kernel_size=3, padding=1, **shape))
    dense, pointwise = conv.branches['origin'], conv.branches['pointwise']
    folded = dense.branches()
    expected = custom_l2(folded, dense.norm, pointwise.branches.weight, pointwise.norm)
    trained = [*dense.branches.parameters(), pointwise.branches.weight]
    assert_same_loss(conv, expected, trained)


@pytest.mark.parametrize('norm_cfg', [None, BN])
@pytest.mark.parametrize('size', [1, 3, 7])
def test_plain(size, norm_cfg):
    conv = trained_like(PlainConv2d(4, 6, size, groups=2, norm_cfg=norm_cfg))
    weight = conv.branches.weight
    assert conv.regularized_kernel() is weight
    assert_same_loss(conv, weight.square().sum(), [weight])
    (gradient,) = gradients(0.5 * conv.regularized_kernel().square().sum(), [weight])
    assert_near(gradient, weight, 1e-14)  # That of SGD's own weight decay.


@pytest.mark.parametrize('size', [1, 3, 7])
def test_orepa(size):
    """The fold, before BatchNorm, so that its state does not matter."""
    conv = trained_like(OREPAConv2d(4, 6, size, groups=2, norm_cfg=BN))
    assert_same_loss(
        conv, conv.branches().square().sum(), list(conv.branches.parameters())
    )
    before = conv.regularized_kernel().detach().clone()
    with torch.no_grad():
        conv.norm.weight.mul_(3)
        conv.norm.running_var.mul_(5)
    assert torch.equal(conv.regularized_kernel(), before)


def dbb_terms(conv, affine):
    """(scale of the last norm, kernel) of the branches, and all kernel weights."""

    def scale(norm):
        std = (norm.running_var + norm.eps).sqrt()
        gamma = norm.weight.detach() if affine else 1
        return (gamma / std)[:, None, None, None]

    outputs, groups = conv.out_channels, conv.groups
    own = conv.in_channels // groups
    origin, pointwise = conv.branches['origin'], conv.branches['pointwise']
    average, kxk = conv.branches['average'], conv.branches['pointwise_kxk']
    weights = [
        origin.branches.weight,
        pointwise.branches.weight,
        average.first.branches.weight,
        kxk.first.branches.weight,
        kxk.second.branches.weight,
    ]
    averaged = (weights[2] * scale(average.first.norm) / 9).expand(-1, -1, 3, 3)
    identity = torch.zeros_like(weights[3])
    for t in range(len(identity)):
        identity[t, t % own] = 1
    first = (weights[3] + identity) * scale(kxk.first.norm)
    composed = []
    for o in range(outputs):
        group = o // (outputs // groups)
        composed.append(
            sum(
                weights[4][o, t] * first[group * own + t]
                for t in range(weights[4].shape[1])
            )
        )
    terms = [
        (scale(origin.norm), weights[0]),
        (scale(average.second.norm), averaged),
        (scale(kxk.second.norm), torch.stack(composed)),
    ]
    return terms, (scale(pointwise.norm), weights[1]), weights


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('groups', [1, 2])
def test_dbb(groups, affine):
    norm_cfg = dict(type='BN', affine=affine)
    conv = DBBConv2d(4, 6, 3, padding=1, groups=groups, norm_cfg=norm_cfg)
    trained_like(conv)
    everywhere, (t1, kernel_1), weights = dbb_terms(conv, affine)
    total = sum(t * kernel for t, kernel in everywhere)
    squares = sum(t.square() for t, _ in everywhere)
    merged = total[:, :, 1:2, 1:2] + t1 * kernel_1
    circle = total.square().sum(dim=(2, 3)) - total[:, :, 1, 1].square()
    expected = (circle / squares[:, :, 0, 0]).sum()
    expected = expected + (merged.square() / (squares + t1.square())).sum()
    assert_same_loss(conv, expected, weights)


@pytest.mark.parametrize('kind', [DBBConv2d, RepVGGConv2d, OREPARepVGGConv2d])
def test_scale_of_a_norm_does_not_matter(kind):
    """A norm undoes the scale of its branch, and must not hide it from the decay."""
    conv = trained_like(kind(4, 4, 3, padding=1))
    before = conv.regularized_kernel().detach()
    with torch.no_grad():
        for branch in conv.branches.values():
            branch.norm.weight.mul_(7)
    assert_near(conv.regularized_kernel(), before, 1e-12)


def test_branches_of_weight_zero():
    """As at the start of ``single_init``: the plain kernel decays alone."""
    conv = RepVGGConv2d(4, 4, 3, padding=1, single_init=True)
    weight = conv.branches['origin'].branches.weight
    kernel = conv.regularized_kernel()
    assert_near(kernel, weight, 1e-12)
    # And where no branch is left of weight, nothing is not a number.
    with torch.no_grad():
        conv.branches['origin'].norm.weight.zero_()
    kernel = conv.regularized_kernel()
    assert not kernel.any()
    (gradient,) = gradients(kernel.square().sum(), [weight])
    assert torch.equal(gradient, torch.zeros_like(weight))


@pytest.mark.parametrize(
    'kind', [PlainConv2d, OREPAConv2d, DBBConv2d, RepVGGConv2d, OREPARepVGGConv2d]
)
def test_deployed(kind):
    conv = trained_like(kind(4, 4, 3, padding=1, norm_cfg=BN))
    conv = switch_to_deploy(conv)
    assert conv.regularized_kernel() is conv.weight
