"""In eval mode and without gradients, training forms run as plain convs."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from helpers import assert_near, counted_folds, trained_like
from torch import nn
from torch.nn import functional as F

from mmorepa.backbones import OREPARepVGG, OREPAResNet
from mmorepa.layers import OREPAConv2d, branch_by_branch, build_conv, eval_form

BN = dict(type='BN')
CONVS = {
    **{
        kind: lambda kind=kind: build_conv(
            kind, 4, 4, 3, padding=1, bias=False, norm_cfg=BN, act_cfg=dict(type='ReLU')
        )
        for kind in ('none', 'dbb', 'orepa', 'repvgg', 'orepa_repvgg')
    },
    'with_bias': lambda: OREPAConv2d(4, 4, 3, padding=1, norm_cfg=BN),
    'without_norm': lambda: OREPAConv2d(4, 4, 3, padding=1, bias=False),
    'group_norm': lambda: OREPAConv2d(
        4, 4, 3, padding=1, norm_cfg=dict(type='GN', num_groups=2)
    ),
    'no_statistics': lambda: OREPAConv2d(
        4, 4, 3, padding=1, norm_cfg=dict(type='BN', track_running_stats=False)
    ),
    'not_affine': lambda: OREPAConv2d(
        4, 4, 1, bias=False, norm_cfg=dict(type='BN', affine=False)
    ),
    'deep_linear': lambda: OREPAConv2d(
        4, 4, 7, padding=3, stride=2, bias=False, norm_cfg=BN
    ),
    'grouped': lambda: OREPAConv2d(
        4, 4, 3, padding=1, groups=2, bias=False, norm_cfg=BN
    ),
}


@pytest.fixture(autouse=True)
def _eval_forms_are_on(monkeypatch, _training_forms_run_branch_by_branch):
    monkeypatch.setattr(eval_form, '_is_on', True)


@pytest.fixture(params=CONVS)
def conv(request):
    return trained_like(CONVS[request.param]()).eval()


def image():
    return torch.randn(2, 4, 9, 9)


@contextmanager
def counted_convs():
    """Counts the convolutions that run, whoever calls for them."""
    calls = []
    conv2d = F.conv2d

    def counted(*args, **kwargs):
        calls.append(1)
        return conv2d(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, 'conv2d', counted)
        yield calls


def test_equals_the_branches(conv):
    x = image()
    with torch.no_grad(), branch_by_branch():
        expected = conv(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_near(conv(x), expected)
            with counted_convs() as calls:
                assert_near(conv(x), expected)
        assert len(calls) == 1


@pytest.mark.parametrize('kind', ['none', 'orepa', 'deep_linear', 'not_affine'])
def test_norm_is_not_run(kind):
    conv = trained_like(CONVS[kind]()).eval()
    conv.norm.forward = None
    with torch.no_grad():
        conv(image())


def test_follows_every_change(conv):
    """Parameters, statistics, loads, and writes that PyTorch does not count."""
    x = image()
    other = trained_like(copy.deepcopy(conv), seed=1).state_dict()
    tensors = {**dict(conv.named_parameters()), **dict(conv.named_buffers())}
    saved = conv.state_dict()
    with torch.no_grad():
        before = conv(x)
        for name, tensor in tensors.items():
            if name not in saved or name.endswith('num_batches_tracked'):
                continue
            for change in (
                lambda t=tensor: t.mul_(1.5),
                lambda t=tensor: t.data.add_(0.1),
                lambda t=tensor: setattr(t, 'data', t.data + 0.1),
            ):
                unchanged = conv(x)
                change()
                with branch_by_branch():
                    expected = conv(x)
                assert not torch.equal(expected, unchanged)
                assert_near(conv(x), expected)
        conv.load_state_dict(other)
        with branch_by_branch():
            expected = conv(x)
        assert_near(conv(x), expected)
        assert not torch.allclose(expected, before)


def test_follows_exchanged_modules():
    """Conversions to another kind of norm keep the parameters and take the place."""
    conv = trained_like(CONVS['orepa']()).eval()
    x = image()
    with torch.no_grad():
        before = conv(x)
        conv.norm = nn.Identity()
        without = conv(x)
        assert not torch.allclose(without, before)
        conv.branches = trained_like(copy.deepcopy(conv.branches), seed=2)
        found = conv(x)
        with branch_by_branch():
            assert_near(found, conv(x))
    assert not torch.allclose(found, without)


def test_training_is_not_touched(conv):
    """Train mode, gradients, and a BatchNorm that still learns its statistics."""
    x = image()
    with torch.no_grad():
        conv(x)
    y = conv(x)
    assert y.requires_grad
    y.square().sum().backward()
    grads = {n: p.grad for n, p in conv.named_parameters()}
    conv.zero_grad()
    with branch_by_branch():
        conv(x).square().sum().backward()
    for name, param in conv.named_parameters():
        assert (grads[name] is None) == (param.grad is None)
        if param.grad is not None:
            assert_near(grads[name], param.grad)

    for norm in conv.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            norm.train()
            before = norm.running_mean.clone()
            with torch.no_grad():
                conv(x)
            assert not torch.equal(norm.running_mean, before)


def test_norm_in_another_precision():
    """Kernel and bias are those of the branches, whatever the norm is in."""
    for kind in ('orepa', 'dbb', 'repvgg'):
        conv = trained_like(CONVS[kind]()).eval()
        with torch.no_grad():
            expected = conv(image())
            conv.bfloat16()
            for norm in conv.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.float()
            torch.manual_seed(0)
            assert conv(image().bfloat16()).dtype == torch.bfloat16
        assert expected.dtype == torch.float32


def test_hooks_are_heard():
    conv = trained_like(CONVS['orepa']()).eval()
    seen = []
    handle = conv.norm.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        conv(image())
        handle.remove()
        conv(image())
    assert len(seen) == 1


def test_folds_once():
    conv = trained_like(CONVS['orepa']()).eval()
    with counted_folds(conv) as folds, torch.no_grad():
        for _ in range(3):
            conv(image())
        assert len(folds) == 1
        conv.train()
        conv.eval()
        conv(image())
    assert len(folds) == 2


def test_copies_and_conversions(conv):
    x = image()
    with torch.no_grad():
        expected = conv(x)
        for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
            trained_like(twin, seed=1)
            assert not torch.allclose(twin(x), expected)
        assert_near(conv(x), expected)
        assert conv.double()(x.double()).dtype == torch.float64
        assert_near(conv(x.double()), expected.double())
        conv.float().switch_to_deploy()
        assert_near(conv(x), expected)


def test_autocast():
    conv = trained_like(CONVS['orepa']()).eval()
    x = image()
    with torch.no_grad():
        expected = conv(x)
        with torch.autocast('cpu', torch.bfloat16):
            y = conv(x)
        assert y.dtype == torch.bfloat16
        assert_near(y.float(), expected, 2e-2)
        # What autocast made was not kept.
        assert_near(conv(x), expected, 1e-7)


@pytest.mark.parametrize(
    'build', [lambda: OREPAResNet(18, base_channels=8), lambda: OREPARepVGG('A0')]
)
def test_networks(build):
    net = trained_like(build()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        with branch_by_branch():
            expected = net(x)
        actual = net(x)
        traced = torch.jit.trace(net, x, check_trace=False)(x)
    assert_near(actual, expected, 1e-4)
    assert_near(traced, expected, 1e-4)
