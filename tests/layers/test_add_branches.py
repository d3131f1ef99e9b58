"""Training forms in the place of plain convs, in any model."""

import copy

import pytest
import torch
import torchvision
from helpers import assert_near, trained_like
from mmengine.registry import MODELS
from torch import nn
from torch.nn.utils import parametrizations

from mmorepa import add_branches, reparameterize, switch_to_deploy
from mmorepa.layers import BLOCKS, OREPAConv2d, ReparamConv2d

NETWORKS = [
    *('resnet18', 'mobilenet_v2'),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ('densenet121', 'efficientnet_b0', 'squeezenet1_0', 'googlenet')
    ),
]


class Odd(nn.Conv2d):
    """A subclass, of which nobody knows what it computes."""


def model():
    shared = nn.Conv2d(6, 6, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(6), shared, nn.ReLU(), shared),
        nn.Conv2d(6, 6, 1, bias=False, groups=2),
    )


def forms(module):
    return [m for m in module.modules() if isinstance(m, ReparamConv2d)]


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_of_torchvision(name):
    plain = trained_like(getattr(torchvision.models, name)()).eval()
    x = torch.randn(1, 3, 64, 64)
    net = add_branches(copy.deepcopy(plain))
    with torch.no_grad():
        expected = plain(x)
        assert_near(net(x), expected, 1e-4)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = net(x)
        assert (trained - expected).abs().max() > 1e-6 * expected.abs().max()
        assert_near(switch_to_deploy(net)(x), trained, 1e-4)
        plain.load_state_dict(net.state_dict(), strict=True)
        assert_near(plain(x), trained, 1e-4)


@pytest.mark.parametrize('block', BLOCKS.module_dict)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_blocks(block, dtype):
    plain = trained_like(model()).to(dtype).eval()
    net = add_branches(copy.deepcopy(plain), block)
    x = torch.randn(2, 3, 9, 9, dtype=dtype)
    with torch.no_grad():
        assert_near(net(x), plain(x), 1e-4 if dtype == torch.float32 else 1e-10)
    assert {t.dtype for t in net.parameters()} == {dtype}
    assert not any(m.training for m in net.modules())
    assert net[1][1] is net[1][3], 'one module at two places'


def test_what_stays(log):
    net = nn.ModuleDict(
        dict(
            even=nn.Conv2d(3, 3, 2),
            wide=nn.Conv2d(3, 3, (1, 3)),
            reflect=nn.Conv2d(3, 3, 3, padding=1, padding_mode='reflect'),
            up=nn.ConvTranspose2d(3, 3, 3),
            odd=Odd(3, 3, 3),
            large=nn.Conv2d(3, 3, 7, groups=3),
            normed=parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
            hooked=nn.Conv2d(3, 3, 3),
            masked=nn.Conv2d(3, 3, 3),
            biased=nn.Conv2d(3, 3, 3),
            one=nn.Conv2d(3, 3, 3),
            other=nn.Conv2d(3, 3, 3),
            good=nn.Conv2d(3, 3, 3),
            mine=OREPAConv2d(3, 3, 3),
        )
    )
    net.one.weight = net.other.weight
    net.biased.bias = net.other.bias
    net.hooked.register_full_backward_pre_hook(lambda *args: None)
    net.masked.weight.register_hook(lambda grad: 0 * grad)
    before = dict(net.named_children())
    assert add_branches(net) is net
    changed = [name for name, m in net.named_children() if m is not before[name]]
    assert changed == ['good']
    (text,) = log
    assert '12 left as they are' in text
    for words in (
        'up: a ConvTranspose2d',
        'odd: a Odd',
        'hooked, masked: has hooks',
        'biased, one, other: shares',
        'normed: ',
        'wide: ',
        'reflect',
        'chosen freely',
    ):
        assert words in text, words


def test_choice():
    net = add_branches(model(), include=['0', '1.*'], exclude='1.1')
    assert forms(net) == [net[0]]
    shared = add_branches(model(), exclude='1.3')  # It is 1.1 as well.
    assert forms(shared) == [shared[0], shared[2]]
    with pytest.raises(ValueError, match="no module with a name like 'head.*'"):
        add_branches(model(), exclude='head.*')
    with pytest.raises(ValueError, match=r"name like \['2.*'\] and not like \['2'\]"):
        add_branches(model(), include='2*', exclude='2')
    with pytest.raises(ValueError, match="unknown block 'opera'"):
        add_branches(model(), 'opera')
    with pytest.raises(ValueError, match='no conv of Linear was re-parameterised'):
        add_branches(nn.Linear(2, 2))


def test_frozen_and_half():
    plain = model()
    plain[0].requires_grad_(False)
    plain[1][1].weight.requires_grad_(False)
    net = add_branches(copy.deepcopy(plain).to(torch.bfloat16))
    assert not any(p.requires_grad for p in net[0].parameters())
    assert net[1][1].bias.requires_grad
    assert not any(p.requires_grad for p in net[1][1].branches.parameters())
    assert all(p.requires_grad for p in net[2].parameters())
    assert {p.dtype for p in forms(net)[0].parameters()} == {torch.bfloat16}
    switch_to_deploy(net)
    for one, other in zip(net.parameters(), plain.parameters()):
        assert one.requires_grad == other.requires_grad


def test_in_a_config(tmp_path):
    """One line for models that take no conv_cfg; plain weights are loaded later."""
    cfg = dict(
        type='mmpretrain.MobileNetV2',
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'plain.pth')),
    )
    plain = trained_like(MODELS.build(cfg))
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    net = MODELS.build(dict(type='Reparameterized', module=cfg, block='orepa'))
    net.init_weights()
    plain.eval(), net.eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert len(forms(net)) == 52
        assert_near(net(x)[-1], plain(x)[-1], 1e-4)


def test_the_former_name():
    with pytest.raises(TypeError, match='add_branches'):
        reparameterize(nn.Conv2d(1, 1, 3))


def test_convs_of_one_shape_get_branches_of_their_own():
    net = add_branches(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    for name, value in net[0].branches.named_parameters():
        other = net[1].branches.get_parameter(name)
        assert name in ('scale', 'weight_pointwise_kxk_1') or not value.equal(other)
