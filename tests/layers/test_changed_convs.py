"""What people set on a conv, before the exchange and after it."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, trained_like
from torch import nn

from mmorepa import add_branches, folded, switch_to_deploy
from mmorepa.layers import (
    DBBConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    ReparamConv2d,
    RepVGGConv2d,
)

WITH_NORMS = [DBBConv2d, RepVGGConv2d, OREPARepVGGConv2d]
ALL = [OREPAConv2d, *WITH_NORMS]


def with_ones(kind, **options):
    conv = kind(1, 1, 3, padding=1, bias=False, **options)
    conv.start_from(torch.ones(1, 1, 3, 3))
    return nn.Sequential(conv).eval()


def forms(model, x):
    """The outputs of the training form, folded for evaluation, and deployed."""
    with torch.no_grad():
        yield model(x)
        with folded(model):
            yield model(x)
        yield switch_to_deploy(copy.deepcopy(model))(x)


def tiled(conv, x, weight, bias):
    """As tools that make images tileable do it."""
    x = F.pad(x, (1, 1, 0, 0), mode='circular')
    x = F.pad(x, (0, 0, 1, 1))
    return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


@pytest.mark.parametrize('mode', ['circular', 'reflect', 'replicate'])
def test_padding_mode_set_later(mode):
    model = with_ones(OREPAConv2d)
    model[0].padding_mode = mode
    for out in forms(model, torch.ones(1, 1, 2, 2)):
        assert_near(out, torch.full((1, 1, 2, 2), 9.0))
    trained_like(model)
    plain = switch_to_deploy(copy.deepcopy(model))
    x = torch.randn(2, 1, 7, 5)
    for out in forms(model, x):
        assert_near(out, plain(x))


@pytest.mark.parametrize('kind', WITH_NORMS)
def test_padding_mode_of_blocks_with_norms(kind):
    conv = kind(2, 2, 3, padding=1)
    conv.padding_mode = 'circular'
    with pytest.raises(ValueError, match="with zeros; .*padding_mode='circular'"):
        conv(torch.randn(1, 2, 9, 8))


def make_dilated(model, rate):
    """As segmentation_models.pytorch does it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            module.dilation = (rate, rate)
            height, width = module.kernel_size
            module.padding = ((height // 2) * rate, (width // 2) * rate)


@pytest.mark.parametrize('kind', ALL)
@pytest.mark.parametrize('stride', [1, 2])
def test_every_conv_inside_is_rewritten(kind, stride):
    plain = nn.Sequential(nn.Conv2d(6, 6, 3, stride, 1), nn.Conv2d(6, 6, 3, padding=1))
    model = nn.Sequential(kind(6, 6, 3, stride, 1), kind(6, 6, 3, padding=1)).eval()
    for conv, other in zip(model, plain):
        conv.start_from(other.weight, other.bias)
    make_dilated(model, 4), make_dilated(plain, 4)
    x = torch.randn(1, 6, 15, 17)
    for out in forms(model, x):
        assert_near(out, plain(x))
    model.train()(x).sum().backward()


@pytest.mark.parametrize('kind', WITH_NORMS)
def test_stride_set_later(kind):
    """Also of what has a branch for its input."""
    model = trained_like(nn.Sequential(kind(4, 4, 3, padding=1))).eval()
    model[0].stride = 2  # As PyTorch takes it.
    x = torch.randn(1, 4, 7, 7)
    expected, *others = forms(model, x)
    assert expected.shape == (1, 4, 4, 4)
    for out in others:
        assert_near(out, expected)
    model[0].padding = 0
    with pytest.raises(ValueError, match=r'dilation \* 1 = 1 here, .*found padding=0'):
        model(x)


@pytest.mark.parametrize('kind', WITH_NORMS)
@pytest.mark.parametrize('dilation', [1, 2])
def test_same_padding(kind, dilation):
    options = dict(padding='same', dilation=dilation)
    model = trained_like(nn.Sequential(kind(4, 4, 3, **options))).eval()
    plain = nn.Conv2d(4, 4, 3, **options)
    plain.load_state_dict(switch_to_deploy(copy.deepcopy(model[0])).state_dict())
    x = torch.randn(1, 4, 7, 7)
    for out in forms(model, x):
        assert_near(out, plain(x))
    net = nn.Sequential(nn.Conv2d(4, 4, 3, **options))
    block = {DBBConv2d: 'dbb', RepVGGConv2d: 'repvgg'}.get(kind, 'orepa_repvgg')
    assert isinstance(add_branches(net, block)[0], kind)


@pytest.mark.parametrize('name', ['forward', '_conv_forward'])
def test_patched_before_the_exchange(name, log):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    if name == 'forward':

        def forward(self, x):
            return tiled(self, x, self.weight, self.bias)

        model[0].forward = types.MethodType(forward, model[0])
    else:
        model[0]._conv_forward = types.MethodType(tiled, model[0])
    x = torch.randn(1, 3, 6, 6)
    expected = model(x)
    assert_near(add_branches(model)(x), expected)
    assert type(model[0]) is nn.Conv2d and isinstance(model[1], ReparamConv2d)
    assert f'0: has a {name} of its own' in log[0]
    assert_near(switch_to_deploy(model)(x), expected)


@pytest.mark.parametrize('norm_cfg', [None, dict(type='BN')])
def test_patched_after_the_exchange(norm_cfg):
    model = nn.Sequential(OREPAConv2d(3, 4, 3, padding=1, norm_cfg=norm_cfg))
    trained_like(model).eval()
    conv = model[0]
    conv._conv_forward = types.MethodType(tiled, conv)
    x = torch.randn(1, 3, 6, 6)
    expected, *others = forms(model, x)
    for out in others:
        assert_near(out, expected)
    conv.forward = lambda x, forward=conv.forward: 2 * forward(x)
    assert_near(model(x), 2 * expected)
    assert_near(switch_to_deploy(model)(x), 2 * expected)


def test_patched_block_does_not_train():
    conv = DBBConv2d(3, 4, 3, padding=1).eval()
    conv._conv_forward = types.MethodType(tiled, conv)
    with pytest.raises(TypeError, match='_conv_forward of its own does not train'):
        conv(torch.randn(1, 3, 6, 6))


def test_attributes_go_along():
    """Those of the conv and of its parameters, as loops of training look for them."""
    plain = nn.Conv2d(3, 4, 3)
    plain.index, plain.weight.no_decay, plain.bias.rate = 7, True, 2
    model = add_branches(nn.Sequential(plain))
    assert model[0].index == 7
    assert all(p.no_decay for p in model[0].branches.parameters())
    model[0].name = 'stem'
    switch_to_deploy(model)
    assert type(model[0]) is nn.Conv2d
    assert (model[0].index, model[0].name) == (7, 'stem')
    assert model[0].weight.no_decay and model[0].bias.rate == 2
    assert vars(model[0]).keys() == {*vars(nn.Conv2d(1, 1, 1)), 'index', 'name'}
    assert copy.deepcopy(model)(torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)


@pytest.mark.parametrize(
    'register',
    [
        lambda conv: conv.register_buffer('mask', torch.ones(4, 1, 1, 1)),
        lambda conv: conv.register_parameter('gain', nn.Parameter(torch.ones(1))),
        lambda conv: conv.add_module('adapter', nn.Conv2d(3, 4, 1)),
    ],
)
def test_what_is_registered_stays(register, log):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    register(model[0])
    before = dict(model.state_dict())
    add_branches(model)
    assert type(model[0]) is nn.Conv2d and ' of its own' in log[0]
    register(model[1])
    switch_to_deploy(model)
    assert len(model.state_dict()) > len(before)
    assert 'branches' not in str(model.state_dict().keys())


class Scaled(OREPAConv2d):
    """A conv of somebody's own, with a state of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((1,), 3.0))

    def _conv_forward(self, x, weight, bias):
        return self.gain * super()._conv_forward(x, weight, bias)


class Masked(OREPAConv2d):
    def kernel(self):
        return super().kernel() * 2


def test_subclasses():
    model = trained_like(nn.Sequential(Scaled(3, 4, 3))).eval()
    x = torch.randn(1, 3, 6, 6)
    expected, *others = forms(model, x)
    for out in others:
        assert_near(out, expected)
    model = trained_like(nn.Sequential(Masked(3, 4, 3))).eval()
    with torch.no_grad(), folded(model):
        assert_near(model(x), model.train()(x))
    with pytest.raises(TypeError, match=r'Masked has a kernel\(\) of its own'):
        switch_to_deploy(model)


@pytest.mark.parametrize('name', ['norm', 'branches'])
def test_hooks_that_fall_silent(name):
    model = nn.Sequential(OREPAConv2d(3, 4, 3, norm_cfg=dict(type='BN')))
    getattr(model[0], name).register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=f'hooks on {name} of a OREPAConv2d are not'):
        switch_to_deploy(model)
