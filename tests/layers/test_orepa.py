"""Every kernel against its branches, run one after another on the feature map."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_near,
    assert_same_gradients,
    deployed_twin,
    gradients,
    trained_like,
)

from mmorepa.layers import DeepLinearConv2d, OREPAConv2d, OREPAKernel


def run_branches(kernel, x, groups):
    """The six branches on a feature map that was padded beforehand, valid borders."""
    out_channels, in_channels = kernel.weight_origin.shape[0], x.shape[1]
    k = kernel.branch_sum.shape[-1]
    half = out_channels / 2

    average = F.avg_pool2d(
        F.conv2d(x, kernel.weight_average, groups=groups), k, stride=1
    )

    filters = torch.zeros(out_channels, 1, k, k)
    for o in range(out_channels):
        for h in range(k):
            for w in range(k):
                tap, row = (h, o + 1) if o < half else (w, o + 1 - half)
                filters[o, 0, h, w] = math.cos(math.pi * (tap + 0.5) * row / k)
    mixed = F.conv2d(x, kernel.weight_frequency, groups=groups)
    frequency = F.conv2d(mixed, filters, groups=out_channels)

    first = kernel.weight_pointwise_kxk_1
    identity = torch.zeros_like(first)
    for t in range(first.shape[0]):
        identity[t, t % (in_channels // groups)] = 1
    hidden = F.conv2d(x, first + identity, groups=groups)
    # Stored with the input channels last: (O, k², Ig), (O, k², T/g), (m, k², I) and
    # (O, m, Ig).
    origin = kernel.weight_origin.transpose(1, 2).unflatten(2, (k, k))
    second = kernel.weight_pointwise_kxk_2.transpose(1, 2).unflatten(2, (k, k))
    depthwise = kernel.weight_depthwise.permute(2, 0, 1).reshape(-1, 1, k, k)
    separable = kernel.weight_separable.transpose(1, 2).reshape(out_channels, -1, 1, 1)
    pointwise_kxk = F.conv2d(hidden, second, groups=groups)

    margin = k // 2
    inner = x[:, :, margin:-margin, margin:-margin]

    maps = F.conv2d(x, depthwise, groups=in_channels)
    outputs = [
        F.conv2d(x, origin, groups=groups),
        average,
        frequency,
        pointwise_kxk,
        F.conv2d(inner, kernel.weight_pointwise, groups=groups),
        F.conv2d(maps, separable, groups=groups),
    ]
    return sum(
        scale[:, None, None] * output for scale, output in zip(kernel.scale, outputs)
    )


def run_deep_linear(kernel, x, groups):
    """The factors one after another; all but the first act as if flipped."""
    first, *factors = kernel.factors
    y = run_branches(first, x, groups)
    for factor in factors:
        y = run_branches(factor, y.flip(2, 3), groups).flip(2, 3)
    return y


def run_pointwise(kernel, x, groups):
    origin = F.conv2d(x, kernel.weight_origin, groups=groups)
    y = F.conv2d(x, kernel.weight_first, groups=groups)
    y = F.conv2d(y, kernel.weight_second, groups=groups)
    return kernel.scale[0, :, None, None] * origin + kernel.scale[1, :, None, None] * y


CONVS = [
    # in, out, k, groups
    (4, 6, 3, 1),
    (6, 4, 5, 1),
    (4, 6, 3, 2),
    (6, 12, 3, 6),
    (12, 6, 3, 6),
    (6, 6, 3, 6),
    (6, 12, 5, 2),
    (4, 5, 3, 1),
    (4, 4, 1, 1),
    (4, 8, 1, 1),
    (8, 4, 1, 1),
    (8, 12, 1, 2),
    (12, 8, 1, 2),
    (12, 12, 1, 6),
    (3, 4, 7, 1),
    (3, 4, 9, 1),
    (4, 6, 7, 2),
    (5, 5, 7, 5),
]


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('in_channels', 'out_channels', 'k', 'groups'), CONVS)
def test_kernel_equals_its_branches_on_the_feature_map(
    in_channels, out_channels, k, groups
):
    conv = trained_like(
        OREPAConv2d(
            in_channels, out_channels, k, padding=k // 2, groups=groups, bias=False
        )
    )
    run = {1: run_pointwise, 3: run_branches, 5: run_branches}.get(k, run_deep_linear)
    x = torch.randn(2, in_channels, 7, 8)
    y = conv(x)
    # The borders agree where the branches see an input that is padded already.
    expected = run(conv.branches, F.pad(x, [k // 2] * 4), groups)
    assert_near(y, expected, 1e-12)
    assert_same_gradients(
        gradients(y, conv.branches), gradients(expected, conv.branches), 1e-12
    )


@pytest.mark.parametrize(
    ('k', 'options', 'words'),
    [
        *((k, dict(branches=['orign']), 'orign') for k in (1, 3, 7)),
        *((k, dict(branches=[]), 'no branch') for k in (1, 3, 7)),
        *((k, dict(initial_scales=dict(averge=1.0)), 'averge') for k in (1, 3, 7)),
        (3, dict(branches='origin'), 'unknown branch'),
        *((7, dict(groups=2, inner_mult=m), 'inner_mult') for m in (0, 0.2, -1)),
    ],
)
def test_bad_input(k, options, words):
    with pytest.raises(ValueError, match=words):
        OREPAConv2d(4, 8, k, **options)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('k', 'groups'), [(3, 1), (7, 1), (7, 2), (9, 1)])
def test_deep_linear_conv_of_plain_factors(k, groups):
    conv = trained_like(
        DeepLinearConv2d(4, 6, k, padding=k // 2, groups=groups, bias=False)
    )
    x = torch.randn(2, 4, 7, 8)
    first, *factors = conv.branches.factors
    expected = F.conv2d(F.pad(x, [k // 2] * 4), first.weight, groups=groups)
    for factor in factors:
        # All but the first act as if flipped.
        expected = F.conv2d(expected, factor.weight.flip(2, 3), groups=groups)
    y = conv(x)
    assert_near(y, expected, 1e-12)
    assert_same_gradients(gradients(y, conv), gradients(expected, conv), 1e-12)
    assert_near(deployed_twin(conv)(x), expected, 1e-12)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('kind', [OREPAConv2d, DeepLinearConv2d])
@pytest.mark.parametrize(
    ('groups', 'inner_mult', 'inner'), [(1, 2, 12), (1, 0.5, 3), (2, 1.5, 8)]
)
def test_inner_channels(kind, groups, inner_mult, inner):
    """In a group of three outputs, 1.5 gives four inner channels, rounded down."""
    conv = trained_like(
        kind(4, 6, 7, padding=3, groups=groups, bias=False, inner_mult=inner_mult)
    )
    first, second, last = (factor().shape for factor in conv.branches.factors)
    assert first == (inner, 4 // groups, 3, 3)
    assert second == (inner, inner // groups, 3, 3)
    assert last == (6, inner // groups, 3, 3)
    x = torch.randn(2, 4, 7, 8)
    y = conv(x)
    if kind is OREPAConv2d:
        expected = run_deep_linear(conv.branches, F.pad(x, [3] * 4), groups)
        assert_near(y, expected, 1e-12)
    assert_near(deployed_twin(conv)(x), y, 1e-12)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('kind', [OREPAConv2d, DeepLinearConv2d])
def test_more_inner_channels_make_any_kernel(kind):
    weight = torch.randn(8, 3, 7, 7)
    with pytest.raises(ValueError, match=r'72 can be chosen freely.*\(inner_mult\)'):
        kind(3, 8, 7).start_from(weight)
    conv = kind(3, 8, 7, inner_mult=4)
    conv.start_from(weight)
    assert_near(conv.kernel(), weight, 1e-10)


def test_deep_linear_conv_of_no_factor():
    """By conv_cfg, a network builds its 1x1 convs of the same class."""
    conv = DeepLinearConv2d(4, 6, 1, groups=2)
    plain = torch.nn.Conv2d(4, 6, 1, groups=2)
    conv.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 5)
    assert_near(conv(x), plain(x), 1e-6)
    conv.switch_to_deploy()
    assert_near(conv(x), plain(x), 1e-6)


def test_fixed_filters_are_not_saved():
    kernel = OREPAKernel(4, 4, 3)
    saved = {name for name, _ in kernel.named_parameters()}
    assert set(kernel.state_dict()) == saved


@pytest.mark.parametrize(
    'branches',
    [
        ['origin'],
        ['average'],
        ['frequency'],
        ['pointwise_kxk'],
        ['pointwise'],
        ['depthwise_separable'],
        # The rows of the scale keep their order, whichever way they were named.
        ['depthwise_separable', 'origin', 'average'],
    ],
)
@pytest.mark.usefixtures('float64')
def test_branches_by_name(branches):
    full = trained_like(OREPAKernel(4, 6, 3, groups=2))
    part = OREPAKernel(4, 6, 3, groups=2, branches=branches)
    order = list(OREPAKernel.INITIAL_SCALES)
    rows = sorted(order.index(name) for name in branches)
    state = full.state_dict()
    state['scale'] = state['scale'][rows]
    part.load_state_dict({name: state[name] for name in part.state_dict()})

    with torch.no_grad():
        for i in range(len(order)):
            if i not in rows:
                full.scale[i] = 0
    assert_near(part(), full(), 1e-14)
    assert len(list(part.parameters())) < len(list(full.parameters()))


def test_branches_reach_all_factors_of_a_large_conv():
    conv = OREPAConv2d(3, 4, 7, branches=['origin', 'pointwise'])
    assert [factor.branch_names for factor in conv.branches.factors] == [
        ('origin', 'pointwise')
    ] * 3


def test_initial_scales():
    scales = dict(frequency=0.1, origin=2.0)
    conv = OREPAConv2d(4, 6, 3, bias=False, initial_scales=scales)
    rows = torch.tensor([2.0, 0.25, 0.1, 0.5, 1.0, 0.5])
    assert torch.equal(conv.branches.scale, rows[:, None].expand(6, 6))

    conv = OREPAConv2d(4, 6, 1, initial_scales=dict(pointwise_pointwise=0.0))
    rows = torch.tensor([1.0, 0.0])
    assert torch.equal(conv.branches.scale, rows[:, None].expand(2, 6))

    # A scale for a branch that is left out makes no row.
    kernel = OREPAKernel(6, 4, 3, branches=['origin'], initial_scales=dict(average=9.0))
    assert torch.equal(kernel.scale, torch.full((1, 6), 0.25))
