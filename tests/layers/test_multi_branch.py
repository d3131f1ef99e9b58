"""DBB and RepVGG blocks: branches with a BatchNorm each, run on the feature map."""

import copy

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

from mmorepa.layers import (
    DBBConv2d,
    MultiBranchConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    PlainConv2d,
    RepVGGConv2d,
)

KINDS = [DBBConv2d, RepVGGConv2d, OREPARepVGGConv2d]
RELU = dict(type='ReLU')

SHAPES = [
    # in, out, k and the rest
    (4, 6, 3, dict()),
    (4, 4, 3, dict()),
    (4, 4, 3, dict(groups=2)),
    (4, 6, 3, dict(stride=2, groups=2)),
    (4, 4, 3, dict(stride=(2, 1))),
    (6, 6, 3, dict(groups=6)),
    (4, 6, 3, dict(dilation=2, padding=2)),
    (4, 6, 5, dict(padding=2, stride=2)),
    (4, 4, 3, dict(bias=True)),
    (4, 6, 3, dict(act_cfg=RELU)),
    (4, 6, 3, dict(norm_cfg=dict(type='BN', eps=0.5))),
    (4, 4, 3, dict(norm_cfg=dict(type='BN', affine=False))),
]


def make(kind, in_channels, out_channels, k, **options):
    options = {'padding': 1, 'bias': False, **options}
    return trained_like(kind(in_channels, out_channels, k, **options))


def normalise(norm, y):
    """BatchNorm from its definition, and what it then makes of a zero."""
    if norm.training:
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        count = y.numel() / y.shape[1]
        moving = [(norm.running_mean, mean), (norm.running_var, var)]
        unbiased = [1, count / (count - 1)]
        new = [0.9 * old + 0.1 * v * u for (old, v), u in zip(moving, unbiased)]
    else:
        mean, var = new = [norm.running_mean, norm.running_var]
    gamma = 1 if norm.weight is None else norm.weight
    beta = 0 if norm.bias is None else norm.bias

    def affine(y, mean, var):
        shape = (1, -1, 1, 1)
        y = (y - mean.reshape(shape)) / (var.reshape(shape) + norm.eps).sqrt()
        return y * torch.as_tensor(gamma).reshape(shape) + torch.as_tensor(
            beta
        ).reshape(shape)

    with torch.no_grad():
        zero = affine(torch.zeros(1, y.shape[1], 1, 1), *new)
    return affine(y, mean, var), zero


def padded(y, value, margin):
    """``y`` inside a map of ``value``."""
    n, c, h, w = y.shape
    out = value.expand(n, c, h + 2 * margin, w + 2 * margin).clone()
    out[:, :, margin : margin + h, margin : margin + w] = y
    return out


def run_dbb(conv, x):
    b = conv.branches
    k, margin = conv.kernel_size[0], conv.padding[0]
    strided = dict(stride=conv.stride, dilation=conv.dilation)
    total, _ = normalise(
        b.origin.norm,
        F.conv2d(
            x, b.origin.branches.weight, padding=margin, groups=conv.groups, **strided
        ),
    )
    y = F.conv2d(
        x[:, :, :: conv.stride[0], :: conv.stride[1]],
        b.pointwise.branches.weight,
        groups=conv.groups,
    )
    total = total + normalise(b.pointwise.norm, y)[0]

    y = F.conv2d(x, b.average.first.branches.weight, groups=conv.groups)
    y = padded(*normalise(b.average.first.norm, y), margin)
    mean = torch.full((conv.out_channels, 1, k, k), 1 / k**2)
    y = F.conv2d(y, mean, groups=conv.out_channels, **strided)
    total = total + normalise(b.average.second.norm, y)[0]

    weight = b.pointwise_kxk.first.branches.weight
    identity = torch.zeros_like(weight)
    for t in range(conv.in_channels):
        identity[t, t % (conv.in_channels // conv.groups)] = 1
    y = F.conv2d(x, weight + identity, groups=conv.groups)
    y = padded(*normalise(b.pointwise_kxk.first.norm, y), margin)
    weight = b.pointwise_kxk.second.branches.weight
    y = F.conv2d(y, weight, groups=conv.groups, **strided)
    return total + normalise(b.pointwise_kxk.second.norm, y)[0]


def run_repvgg(conv, x):
    b = conv.branches
    options = dict(stride=conv.stride, groups=conv.groups)
    # The OREPA kernel has tests of its own.
    kernel = b.origin.branches()
    y = F.conv2d(x, kernel, padding=conv.padding, dilation=conv.dilation, **options)
    total = normalise(b.origin.norm, y)[0]
    y = F.conv2d(x, b.pointwise.branches.weight, **options)
    total = total + normalise(b.pointwise.norm, y)[0]
    if conv.in_channels == conv.out_channels and conv.stride == (1, 1):
        total = total + normalise(b.identity.norm, x)[0]
    else:
        assert 'identity' not in b
    return total


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('in_channels', 'out_channels', 'k', 'options'), SHAPES)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_forward_is_the_formula(kind, training, in_channels, out_channels, k, options):
    conv = make(kind, in_channels, out_channels, k, **options).train(training)
    run = run_dbb if kind is DBBConv2d else run_repvgg
    x = torch.randn(3, in_channels, 8, 9)
    # First, since the running statistics move.
    expected = run(conv, x)
    if conv.bias is not None:
        expected = expected + conv.bias[:, None, None]
    if conv.act is not None:
        expected = expected.relu()
    expected_gradients = gradients(expected, conv)
    y = conv(x)
    assert_near(y, expected, 1e-12)
    assert_same_gradients(gradients(y, conv), expected_gradients, 1e-9)


@pytest.mark.parametrize(('in_channels', 'out_channels', 'k', 'options'), SHAPES)
@pytest.mark.parametrize('kind', KINDS)
def test_deployed_equals_training_form(kind, in_channels, out_channels, k, options):
    conv = make(kind, in_channels, out_channels, k, **options).eval()
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, 1e-11)]:
        conv.to(dtype)
        twin = deployed_twin(conv)
        x = torch.randn(2, in_channels, 9, 8, dtype=dtype)
        assert_near(twin(x), conv(x), tolerance)
        assert set(twin.state_dict()) == {'weight', 'bias'}
        assert not list(twin.modules())[1:] or conv.act is not None

        built = kind(
            in_channels,
            out_channels,
            k,
            deploy=True,
            **{'padding': 1, 'bias': False, **options},
        )
        built.to(dtype).load_state_dict(conv.state_dict())
        assert_near(built(x), conv(x), tolerance)


@pytest.mark.parametrize('kind', KINDS)
def test_autocast(kind):
    conv = make(kind, 4, 4, 3).train()
    twin = copy.deepcopy(conv)
    x = torch.randn(4, 4, 9, 9)
    with torch.autocast('cpu', torch.bfloat16):
        y = conv(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None for p in conv.parameters())
    assert_near(y.float(), twin(x), 5e-2)


def last_norms(conv):
    return {name: b.norm.weight.unique().tolist() for name, b in conv.branches.items()}


@pytest.mark.parametrize('kind', KINDS)
def test_initial_scales_and_single_init(kind):
    options = dict(padding=1)
    conv = kind(4, 4, 3, **options)
    assert last_norms(conv) == {name: [1.0] for name in kind.BRANCH_NAMES}
    conv = kind(4, 4, 3, initial_scales=dict(pointwise=0.25), **options)
    assert last_norms(conv)['pointwise'] == [0.25]
    assert last_norms(conv)['origin'] == [1.0]
    conv = kind(
        4, 4, 3, single_init=True, initial_scales=dict(pointwise=0.5), **options
    )
    expected = dict.fromkeys(kind.BRANCH_NAMES, [0.0])
    assert last_norms(conv) == {**expected, 'origin': [1.0], 'pointwise': [0.5]}
    conv = kind(4, 4, 3, single_init=True, initial_scales=dict(origin=2.0), **options)
    assert last_norms(conv) == {**expected, 'origin': [2.0]}


def test_single_init_is_the_plain_conv():
    """Of both families, the blocks start as their main branch."""
    x = torch.randn(2, 4, 8, 8)
    conv = DBBConv2d(4, 4, 3, padding=1, bias=False, single_init=True).eval()
    assert_near(conv(x), conv.branches.origin(x))
    conv = OREPAConv2d(4, 4, 3, padding=1, bias=False, single_init=True)
    origin = conv.branches.branch_sum.as_conv(
        'weight_origin', conv.branches.weight_origin
    )
    assert torch.equal(conv.kernel(), origin)
    conv = OREPAConv2d(4, 4, 1, bias=False, single_init=True)
    assert torch.equal(conv.kernel(), conv.branches.weight_origin)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(padding=0), r'padding=\(0, 0\)'),
        (dict(dilation=2), r'dilation=\(2, 2\)'),
        (dict(padding=(1, 2), dilation=(1, 2)), r'padding=\(1, 2\)'),
        (dict(branches=['orign']), 'orign'),
        (dict(branches=[]), 'no branch'),
        (dict(initial_scales=dict(orign=1.0)), 'orign'),
        (dict(norm_cfg=dict(type='BN', track_running_stats=False)), 'BatchNorm'),
        (dict(norm_cfg=dict(type='GN', num_groups=2)), 'BatchNorm'),
    ],
)
def test_bad_input(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(4, 4, 3, **{'padding': 1, **options})


@pytest.mark.parametrize('kind', KINDS)
def test_kernel_and_deployed_checkpoints(kind):
    """The training form has no kernel, and takes no deployed one."""
    conv = make(kind, 4, 4, 3)
    with pytest.raises(NotImplementedError):
        conv.kernel()
    deployed = deployed_twin(conv)
    assert deployed.kernel() is deployed.weight
    with pytest.raises(RuntimeError, match='deployed'):
        conv.load_state_dict(deployed.state_dict())


def test_a_block_of_ones_own():
    class Twins(MultiBranchConv2d):
        BRANCH_NAMES = ('origin', 'other')

        def build_branch(self, name):
            options = dict(padding=self.padding, bias=False, norm_cfg=self.norm_cfg)
            return PlainConv2d(self.in_channels, self.out_channels, 3, **options)

    conv = make(Twins, 4, 6, 3).eval()
    x = torch.randn(2, 4, 8, 8)
    assert_near(deployed_twin(conv)(x), conv(x))
