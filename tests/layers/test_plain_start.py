"""Training forms that start from plain convs."""

import copy

import pytest
import torch
from helpers import assert_near, trained_like
from mmengine.model import (
    constant_init,
    kaiming_init,
    normal_init,
    trunc_normal_init,
    xavier_init,
)
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmorepa import add_branches, switch_to_deploy
from mmorepa.layers import (
    DBBConv2d,
    DeepLinearConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    PlainConv2d,
    RepVGGConv2d,
)

BN = dict(type='BN')
FOLDED = [
    (OREPAConv2d, dict(kernel_size=3, padding=1)),
    (OREPAConv2d, dict(kernel_size=3, padding=2, dilation=2, groups=3)),
    (OREPAConv2d, dict(kernel_size=5, padding=2, stride=2)),
    (OREPAConv2d, dict(kernel_size=1)),
    (OREPAConv2d, dict(kernel_size=1, groups=3)),
    (OREPAConv2d, dict(kernel_size=7, padding=3, stride=2)),
    (OREPAConv2d, dict(kernel_size=3, padding=1, branches=['origin', 'average'])),
    (DeepLinearConv2d, dict(kernel_size=7, padding=3)),
    (DeepLinearConv2d, dict(kernel_size=3, padding=1)),
    (PlainConv2d, dict(kernel_size=3, padding=1)),
]
WITH_NORMS = [DBBConv2d, RepVGGConv2d, OREPARepVGGConv2d]
# For the deep linear kernels, this leaves enough freedom.
CHANNELS = (3, 48)


def plain_of(conv):
    """A plain conv with the arguments of a training form."""
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
    )


def row_power(weight):
    return weight.detach().square().sum(dim=(1, 2, 3)).mean().item()


@pytest.mark.parametrize(('kind', 'options'), FOLDED)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_start(kind, options, dtype):
    conv = kind(*CHANNELS, **options).to(dtype)
    plain = plain_of(conv).to(dtype)
    conv.start_from(plain.weight, plain.bias)
    x = torch.randn(2, CHANNELS[0], 11, 11, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert_near(conv(x), plain(x), tolerance)
    assert_near(switch_to_deploy(copy.deepcopy(conv))(x), plain(x), tolerance)


def test_quiet_start_moves_like_a_plain_conv():
    """All the gradient goes through origin and the scales."""
    conv = OREPAConv2d(4, 6, 3, padding=1)
    plain = plain_of(conv)
    conv.start_from(plain.weight, plain.bias)
    x = torch.randn(2, 4, 7, 7)
    for module in (conv, plain):
        module(x).square().sum().backward()
    branches = conv.branches
    origin = branches.branch_sum.as_conv('weight_origin', branches.weight_origin.grad)
    assert_near(origin, plain.weight.grad, 1e-5)
    assert not branches.weight_average.grad.any()
    assert branches.scale.grad[1:].any(dim=1).all(), 'a branch that never wakes up'


def first_steps(conv, plain, x, normalize):
    """How far a small step moves the kernels."""
    found = []
    for module in (conv, plain):
        kernel = module.weight.detach().clone()
        out = module(x)
        if normalize:
            out = nn.functional.batch_norm(out, None, None, training=True)
        generator = torch.Generator().manual_seed(0)
        wanted = torch.randn(out.shape, dtype=out.dtype, generator=generator)
        (out * wanted).sum().backward()
        torch.optim.SGD(module.parameters(), lr=1e-7).step()
        found.append((module.weight.detach() - kernel).norm().item())
    return found


@pytest.mark.parametrize(
    ('channels', 'size', 'groups'),
    [
        *(((32, 32), size, 32) for size in (1, 3, 5)),
        *(((3, 64), size, 1) for size in (1, 3, 5, 7, 9)),
        *(((16, 96), 1, 1), ((96, 16), 1, 1), ((8, 96), 7, 1), ((1, 16), 7, 1)),
    ],
)
def test_quiet_start_is_quiet(channels, size, groups):
    """Of depthwise convs and stems too."""
    options = dict(padding=size // 2, groups=groups, bias=False)
    conv = OREPAConv2d(*channels, size, **options).double()
    plain = nn.Conv2d(*channels, size, **options).double()
    conv.start_from(plain.weight)
    assert_near(conv.weight.detach(), plain.weight, 1e-10)
    # Smooth, as images are.
    x = nn.functional.avg_pool2d(torch.randn(4, channels[0], 24, 24), 3, 1, 1).double()
    moved, moved_plain = first_steps(conv, plain, x, normalize=True)
    assert 0.5 * moved_plain < moved < 2 * moved_plain


def test_half_after_some_steps():
    """Branches stay in the range of float16 where they are quiet."""
    for seed in range(4):
        torch.manual_seed(seed)
        convs = [nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8)]
        norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
        layers = [layer for pair in zip(convs, norms) for layer in pair]
        model = add_branches(nn.Sequential(*layers))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x = torch.randn(8, 3, 12, 12)
        wanted = torch.randn(8, 8, 8, 8)
        for _ in range(6):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
        model.eval()
        half = switch_to_deploy(copy.deepcopy(model).half()).float()
        with torch.no_grad():
            assert_near(half(x), model(x), 0.02)


def norm_like_trained(channels):
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(7)
    return norm


@pytest.mark.parametrize('kind', [*WITH_NORMS, OREPAConv2d, PlainConv2d])
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('is_trained', [False, True])
@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
def test_conv_and_norm(kind, deploy, is_trained, load):
    options = dict(padding=1, groups=2, bias=False, norm_cfg=BN)
    conv = kind(6, 6, 3, deploy=deploy, **options)
    if is_trained:
        trained_like(conv)
    plain = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
    norm = norm_like_trained(6)
    state = {'0.weight': plain.weight.detach()}
    state.update({f'0.norm.{name}': v for name, v in norm.state_dict().items()})
    model = nn.Sequential(conv)
    load(model, state, strict=True)
    x = torch.randn(2, 6, 9, 9)
    # Eval mode comes last: in the other one, both update their statistics.
    for mode in [False] if deploy else [False, True, False]:
        model.train(mode), norm.train(mode)
        assert_near(model(x), norm(plain(x)), 1e-5)
    if not deploy:
        model(x).square().sum().backward()
        assert_near(switch_to_deploy(model)(x), norm(plain(x)), 1e-5)


@pytest.mark.parametrize('kind', [*WITH_NORMS, OREPAConv2d, PlainConv2d])
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
def test_from_the_training_form_of_a_plain_conv(kind, deploy, load):
    """That of PlainConv2d has its kernel among the branches."""
    options = dict(padding=1, bias=False, norm_cfg=BN)
    plain = nn.Sequential(trained_like(PlainConv2d(6, 6, 3, **options))).eval()
    model = nn.Sequential(kind(6, 6, 3, deploy=deploy, **options)).eval()
    load(model, plain.state_dict(), strict=True)
    x = torch.randn(2, 6, 9, 9)
    assert_near(model(x), plain(x), 1e-5)
    # PlainConv2d takes its own state, and has not started anew.
    starts_anew = not deploy and kind is not PlainConv2d
    assert model[0].is_plain_start is starts_anew


@pytest.mark.parametrize('kind', WITH_NORMS)
def test_norms_of_branches_without_a_plain_one(kind):
    """In eval mode it is the plain conv; a norm that follows makes the rest equal."""
    conv = trained_like(kind(4, 4, 3, padding=1, bias=False))
    plain = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    conv.load_state_dict(plain.state_dict())
    x = torch.randn(4, 4, 9, 9)
    assert_near(conv.eval()(x), plain(x), 1e-5)
    follows = nn.BatchNorm2d(4, eps=1e-12)
    assert_near(follows(conv.train()(x)), follows(plain(x)), 1e-3)
    deployed = trained_like(kind(4, 4, 3, padding=1, bias=False, deploy=True))
    deployed.load_state_dict(plain.state_dict())
    assert_near(deployed(x), plain(x), 1e-5)
    with pytest.raises(RuntimeError, match='bias'):  # It had one.
        kind(4, 4, 3, padding=1, deploy=True).load_state_dict(plain.state_dict())


@pytest.mark.parametrize(('kind', 'options'), FOLDED)
def test_loading(kind, options):
    conv = kind(*CHANNELS, **options)
    plain = plain_of(conv)
    x = torch.randn(2, CHANNELS[0], 11, 11)
    for load in (nn.Module.load_state_dict, load_state_dict):
        trained_like(conv)
        load(conv, plain.state_dict(), strict=True)
        assert conv.is_plain_start
        assert_near(conv(x), plain(x), 1e-4)
    conv.load_state_dict(conv.state_dict())
    assert not conv.is_plain_start


def one_weight(*shape, **more):
    return {'weight': torch.randn(*shape), **more}


@pytest.mark.parametrize(
    ('conv', 'state', 'words'),
    [
        (lambda: OREPAConv2d(3, 16, 7), one_weight(16, 3, 7, 7), '0.weight.*16'),
        (lambda: OREPAConv2d(4, 4, 7, groups=4), one_weight(4, 1, 7, 7), 'freely'),
        (lambda: OREPAConv2d(4, 6, 3), one_weight(6, 4, 1, 1), 'size mismatch'),
        (
            lambda: OREPAConv2d(4, 6, 3, bias=False),
            one_weight(6, 4, 3, 3, bias=torch.randn(6)),
            'bias',
        ),
        (
            lambda: OREPAConv2d(4, 6, 3, branches=['average']),
            one_weight(6, 4, 3, 3),
            'only average',
        ),
        (
            lambda: DBBConv2d(4, 6, 3, padding=1, bias=False, branches=['average']),
            one_weight(6, 4, 3, 3),
            'only average',
        ),
        *(
            (
                lambda norm=norm: OREPAConv2d(4, 6, 3, bias=False, norm_cfg=norm),
                one_weight(6, 4, 3, 3, **{'norm.weight': torch.ones(6)}),
                'norm',
            )
            for norm in (BN, None)
        ),
    ],
)
def test_what_has_no_start(conv, state, words):
    module = nn.Sequential(conv())
    with pytest.raises(RuntimeError, match=words):
        module.load_state_dict({f'0.{name}': value for name, value in state.items()})


def test_start_from_bad_arguments():
    conv = OREPAConv2d(4, 6, 3)
    with pytest.raises(ValueError, match='kernel'):
        conv.start_from(torch.ones(6, 4, 1, 1))
    with pytest.raises(ValueError, match='bias'):
        conv.start_from(torch.ones(6, 4, 3, 3), torch.ones(4))
    conv.switch_to_deploy()
    with pytest.raises(ValueError, match='deployed'):
        conv.start_from(torch.ones(6, 4, 3, 3))


def test_bias_before_the_norm():
    """That of a conv with BatchNorms in its branches is added after them."""
    plain = nn.Conv2d(4, 6, 3, padding=1)
    norm = norm_like_trained(6)
    state = {**plain.state_dict()}
    state.update({f'norm.{name}': v for name, v in norm.state_dict().items()})
    x = torch.randn(2, 4, 9, 9)
    for kind in (*WITH_NORMS, OREPAConv2d):
        conv = trained_like(kind(4, 6, 3, padding=1, norm_cfg=BN))
        conv.load_state_dict(state)
        for mode in (False, True):
            reference = copy.deepcopy(norm).train(mode)(plain(x))
            assert_near(conv.train(mode)(x), reference, 1e-5)


@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
def test_parts_are_reported_as_for_a_plain_conv(load):
    plain = nn.Conv2d(4, 6, 3)
    other = nn.Conv2d(4, 5, 3)
    for state, message in (
        ({'weight': plain.weight}, r'[Mm]issing key.* "?bias'),
        ({'weight': plain.weight, 'bias': other.bias}, 'size mismatch for bias'),
        (other.state_dict(), 'size mismatch for weight: .*5, 4, 3, 3'),
    ):
        for conv in (nn.Conv2d(4, 6, 3), trained_like(OREPAConv2d(4, 6, 3))):
            bias = conv.bias.detach().clone()
            with pytest.raises(RuntimeError, match=message):
                load(conv, state, strict=True)
            assert torch.equal(conv.bias, bias)
            if state['weight'] is plain.weight:
                assert_near(conv.weight.detach(), plain.weight, 1e-5)


def test_a_head_of_another_size_is_passed_over():
    """As MMEngine's load_from does it with a plain conv."""
    model = nn.Sequential(OREPAConv2d(3, 4, 1), OREPAConv2d(4, 6, 1))
    kernel = model[1].weight.detach().clone()
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 80, 1))
    load_state_dict(model, plain.state_dict(), strict=False)
    assert_near(model[0].weight.detach(), plain[0].weight, 1e-5)
    assert_near(model[1].weight.detach(), kernel, 1e-6)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda b: prune.l1_unstructured(b, 'weight_origin', 0.5),
        lambda b: parametrizations.weight_norm(b, 'weight_origin'),
    ],
)
def test_branches_that_are_computed_cannot_start(wrap):
    conv = trained_like(OREPAConv2d(4, 6, 3))
    wrap(conv.branches)
    kernel = conv.weight.detach().clone()
    with pytest.raises(ValueError, match="'weight_origin' is computed"):
        conv.start_from(torch.ones(6, 4, 3, 3))
    assert_near(conv.weight.detach(), kernel, 1e-6)


# Rules of init_weights

RULES = [
    lambda conv: constant_init(conv, 3.0, bias=2.0),
    lambda conv: kaiming_init(conv, bias=2.0),
    lambda conv: kaiming_init(conv, distribution='uniform', bias=2.0),
    lambda conv: normal_init(conv, std=0.01, bias=2.0),
    lambda conv: trunc_normal_init(conv, std=0.02, bias=2.0),
    lambda conv: xavier_init(conv, distribution='uniform', bias=2.0),
    lambda conv: (nn.init.orthogonal_(conv.weight), nn.init.constant_(conv.bias, 2)),
    lambda conv: (nn.init.dirac_(conv.weight), nn.init.constant_(conv.bias, 2)),
    lambda conv: (conv.weight.data.normal_(0, 0.3), conv.bias.data.fill_(2)),
    lambda conv: (nn.init.normal_(conv.weight.data[1:]), conv.bias.data.fill_(2)),
]


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize(('kind', 'options'), [FOLDED[0], FOLDED[3], FOLDED[5]])
def test_rule_sets_the_folded_kernel(rule, kind, options):
    conv = kind(3, 48, **options)
    plain = plain_of(conv)
    plain.load_state_dict(dict(weight=conv.weight.detach(), bias=conv.bias))
    for module in (plain, conv):
        torch.manual_seed(0)
        rule(module)
    assert_near(conv.weight.detach(), plain.weight, 1e-4)
    assert_near(conv.bias, plain.bias)
    assert all(p.requires_grad and p.grad_fn is None for p in conv.parameters())


@pytest.mark.parametrize('options', [dict(bias=False), dict(norm_cfg=BN)])
@pytest.mark.parametrize(
    'rule', [kaiming_init, normal_init, trunc_normal_init, xavier_init]
)
def test_random_rules_leave_convs_before_a_norm(options, rule):
    conv = OREPAConv2d(4, 6, 3, **options)
    before = copy.deepcopy(conv.branches.state_dict())
    rule(conv)
    for name, value in conv.branches.state_dict().items():
        assert torch.equal(value, before[name])
    # What is no matter of scale is done.
    weight = conv.weight.data.normal_()
    weight[0].zero_()
    assert not conv.kernel()[0].any()
    nn.init.zeros_(conv.weight)
    assert not conv.kernel().any()


def test_rules_for_every_conv_inside():
    """Branches without weights have nothing to start."""

    def rule(module):
        if isinstance(module, nn.Conv2d) and hasattr(module, 'weight'):
            nn.init.kaiming_normal_(module.weight)

    conv = DBBConv2d(4, 6, 3, padding=1).apply(rule)
    average = next(m for m in conv.modules() if type(m).__name__ == 'AverageConv2d')
    with torch.no_grad(), pytest.raises(ValueError, match='Average.* a fixed kernel'):
        average.weight.zero_()


@pytest.mark.parametrize('rule', [normal_init, trunc_normal_init])
@pytest.mark.parametrize(
    ('channels', 'options'),
    [
        ((3, 16), {}),
        ((16, 16), dict(groups=16)),
        ((4, 16), dict(kernel_size=3, branches=['average', 'pointwise'])),
    ],
)
def test_random_rules_where_there_is_no_exact_start(channels, options, rule):
    conv = OREPAConv2d(*channels, **{'kernel_size': 7, **options})
    plain = plain_of(conv)
    assert row_power(conv.weight) == pytest.approx(row_power(plain.weight), rel=0.4)
    for module in (conv, plain):
        rule(module, std=0.02)
    assert row_power(conv.weight) == pytest.approx(row_power(plain.weight), rel=0.4)
    with torch.no_grad(), pytest.raises(ValueError):
        conv.weight.copy_(plain.weight)


@pytest.mark.parametrize('size', [1, 3, 5, 7])
def test_fresh_convs_without_a_norm(size):
    """They start as plain convs do."""
    options = dict(padding=size // 2)
    conv = OREPAConv2d(24, 48, size, **options)
    plain = plain_of(conv)
    assert row_power(conv.weight) == pytest.approx(row_power(plain.weight), rel=0.2)
    assert conv.bias.std().item() == pytest.approx(plain.bias.std().item(), rel=0.5)


# Writing to the weight


def test_writes_reach_the_conv():
    conv = trained_like(OREPAConv2d(4, 6, 3))
    x = torch.randn(1, 4, 5, 5)
    weight = conv.weight.detach().clone()
    for write in (
        lambda w: w.mul_(0.5),
        lambda w: w.__setitem__((slice(None), 1), 3.0),
        lambda w: w[2].zero_(),
        lambda w: w.view(6, -1)[:, 4].fill_(1.0),
        lambda w: w.clamp_(min=0),
        lambda w: w.copy_(torch.ones(6, 4, 3, 3)),
        lambda w: w.chunk(2)[1].mul_(0.5),
        lambda w: [row.add_(1) for row in w],
        lambda w: torch.sub(w, 1.5, out=w),
        lambda w: nn.functional.relu(w, inplace=True),
        lambda w: torch._foreach_mul_([w], 0.5),
    ):
        write(weight)
        write(conv.weight.data)
        assert_near(conv.weight.detach(), weight, 1e-5)
        expected = nn.functional.conv2d(x, weight, conv.bias)
        assert_near(conv(x), expected, 1e-5)


def test_a_parameter_made_of_the_weight_is_its_own():
    conv = OREPAConv2d(4, 6, 3)
    before = conv.weight.detach().clone()
    nn.Parameter(conv.weight.detach()).data.zero_()
    conv.weight.detach().zero_()
    assert_near(conv.weight.detach(), before)
    with pytest.raises(TypeError, match='is no parameter'):
        conv.weight.mul_(2)
    conv.weight.requires_grad_()
    assert_near(conv.weight.detach(), before)


def test_built_on_meta():
    with torch.device('meta'):
        conv = OREPAConv2d(4, 6, 3)
    plain = nn.Conv2d(4, 6, 3)
    with pytest.raises(RuntimeError, match='on meta, .* build the model on a device'):
        conv.load_state_dict(plain.state_dict())
    conv.to_empty(device='cpu')
    nn.init.constant_(conv.branches.weight_average, float('nan'))
    with pytest.raises(RuntimeError, match=r'were never written \(to_empty\)'):
        conv.load_state_dict(plain.state_dict())
    trained_like(conv)
    conv.load_state_dict(plain.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert_near(conv(x), plain(x), 1e-5)
