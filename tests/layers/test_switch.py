import copy

import pytest
import torch
from helpers import assert_near, trained_like
from mmengine.model import BaseModel
from torch import nn

from mmorepa import is_switchable, switch_to_deploy
from mmorepa.layers import ConvAct2d, OREPAConv2d, PlainConv2d, ReparamConv2d


class Detector(BaseModel):
    """Convs at several depths, one of them used twice."""

    def __init__(self):
        super().__init__()
        bn = dict(norm_cfg=dict(type='BN'))
        self.backbone = nn.Sequential(OREPAConv2d(3, 4, 7, **bn), nn.ReLU())
        self.heads = nn.ModuleDict({'a': nn.ModuleList([PlainConv2d(4, 4, 3, **bn)])})
        self.head = OREPAConv2d(4, 4, 3, padding=1)
        self.twice = nn.Sequential(self.head, nn.BatchNorm2d(4), self.head)

    def forward(self, x):
        return self.twice(self.heads['a'][0](self.backbone(x)))


def test_switches_everything_inside():
    model = trained_like(Detector()).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert is_switchable(model)
    assert switch_to_deploy(model) is model
    assert not is_switchable(model)
    assert_near(model(x), expected)
    assert not any('branches' in name for name in model.state_dict())
    # What is not of ours is left alone.
    assert isinstance(model.twice[1], nn.BatchNorm2d)

    state = copy.deepcopy(model.state_dict())
    switch_to_deploy(model)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


def test_partly_deployed():
    model = trained_like(Detector()).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    model.head.switch_to_deploy()
    assert is_switchable(model)
    switch_to_deploy(model)
    assert_near(model(x), expected)


class Doubled(OREPAConv2d):
    """Somebody's own conv."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_the_plain_conv_would_not_do():
    """Hooks and a forward() of their own go on."""
    model = nn.Sequential(Doubled(3, 4, 3), OREPAConv2d(4, 4, 3), OREPAConv2d(4, 4, 3))
    seen = []
    trained_like(model)[1].register_full_backward_hook(lambda *args: seen.append(1))
    x = torch.randn(1, 3, 9, 9)
    expected = model(x)
    assert_near(switch_to_deploy(model)(x), expected)
    model(x).sum().backward()
    assert seen
    assert [type(m) for m in model] == [Doubled, nn.Conv2d, nn.Conv2d]


def test_hooks_of_a_conv_with_an_activation():
    """They see what comes after it, and so the conv keeps its class."""
    model = nn.Sequential(OREPAConv2d(3, 4, 3, act_cfg=dict(type='ReLU')))
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(args[-1].min() >= 0))
    switch_to_deploy(model)(torch.randn(1, 3, 9, 9))
    assert seen == [True] and type(model[0]) is OREPAConv2d


@pytest.mark.parametrize('act_cfg', [None, dict(type='ReLU')])
def test_attributes_stay(act_cfg):
    model = nn.Sequential(OREPAConv2d(3, 4, 3, act_cfg=act_cfg))
    model[0].stage = 'first'
    run, x = model[0].forward, torch.randn(1, 3, 9, 9)
    expected = model(x)
    switch_to_deploy(model)
    assert type(model[0]) is (ConvAct2d if act_cfg else nn.Conv2d)
    assert model[0].stage == 'first' and copy.deepcopy(model)[0].stage == 'first'
    assert_near(run(x), expected)


def test_modules_of_a_conv_with_an_activation():
    """Their entries of the state dict keep their names."""
    model = nn.Sequential(OREPAConv2d(3, 4, 3, act_cfg=dict(type='ReLU')))
    model[0].scale = nn.Parameter(torch.ones(1))
    switch_to_deploy(model)
    assert sorted(model.state_dict()) == ['0.bias', '0.scale', '0.weight']


class Halved(OREPAConv2d):
    """A kernel that the deployed form would not have."""

    def kernel(self):
        return super().kernel() / 2


def test_refused_as_a_whole():
    model = nn.Sequential(OREPAConv2d(3, 4, 3), Halved(4, 4, 3))
    with pytest.raises(TypeError, match='kernel'):
        switch_to_deploy(model)
    assert not any(conv.deployed for conv in model)


class OneDimension(ReparamConv2d, nn.Conv2d):
    """Branches whose parameters are no matrices."""

    def build_branches(self):
        return Outer(self.out_channels, self.in_channels)


class Outer(nn.Module):
    def __init__(self, *channels):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(n)) for n in channels)

    def forward(self):
        return torch.outer(self.a, self.b)[..., None, None].expand(-1, -1, 3, 3)


class Fixed(ReparamConv2d, nn.Conv2d):
    def build_branches(self):
        module = nn.Module()
        module.register_buffer('weight', torch.ones(self.kernel_shape))
        module.forward = lambda: module.weight
        return module


def test_parameters_of_one_dimension_and_none():
    conv = OneDimension(3, 4, 3)
    x = torch.randn(1, 3, 9, 9)
    expected = conv(x)
    assert_near(switch_to_deploy(conv)(x), expected)
    model = nn.Sequential(OREPAConv2d(3, 4, 3), Fixed(4, 4, 3))
    with pytest.raises(TypeError, match='no parameters'):
        switch_to_deploy(model)
    assert not model[0].deployed
