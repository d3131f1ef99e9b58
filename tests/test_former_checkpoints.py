"""Checkpoints in the order in which an earlier version stored the branches."""

import pytest
import torch
from helpers import assert_near
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmorepa.backbones import OREPAResNet
from mmorepa.converters import load_strictly
from mmorepa.layers import OREPAConv2d, OREPAKernel


@pytest.fixture
def saved():
    return torch.load('tests/goldens/former_order.pt', weights_only=True)


BN = dict(type='BN')
CONVS = [
    ((3, 8, 7), dict(padding=3, bias=False, norm_cfg=BN, act_cfg=dict(type='ReLU'))),
    ((8, 8, 3), dict(padding=1, groups=2, bias=False, norm_cfg=BN)),
    ((8, 6, 5), dict(padding=2)),
    ((6, 3, 3), dict(padding=1)),
    ((3, 4, 1), dict()),
]


def build(deploy=False):
    return nn.Sequential(
        *(OREPAConv2d(*shape, deploy=deploy, **options) for shape, options in CONVS)
    )


def outputs(net, x):
    with torch.no_grad():
        return net.eval()(x)


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('deploy', [False, True])
def test_they_load(saved, assign, deploy):
    net = build(deploy)
    net.load_state_dict(saved['state_dict'], assign=assign)
    assert_near(outputs(net, saved['x']), saved['before'])


def test_they_load_strictly(saved):
    """By the tools, too."""
    net = build()
    load_strictly(net, saved['state_dict'])
    assert_near(outputs(net, saved['x']), saved['before'])


def test_a_backbone_starts_from_them(tmp_path):
    net = OREPAResNet(18, base_channels=8)
    state = net.state_dict()
    for name, kernel in net.named_modules():
        if isinstance(kernel, OREPAKernel):
            for role in kernel.branch_sum.roles.keys() & kernel._parameters.keys():
                weight = kernel.branch_sum.as_conv(role, state[f'{name}.{role}'])
                if role == 'weight_pointwise_kxk_2':
                    weight = weight.permute(0, 2, 3, 1)
                state[f'{name}.{role}'] = weight.contiguous()
    torch.save(state, tmp_path / 'former.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'former.pth'))
    other = OREPAResNet(18, base_channels=8, init_cfg=init_cfg)
    other.init_weights()
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_what_is_loaded_is_saved_in_todays_order(saved):
    net = build()
    net.load_state_dict(saved['state_dict'])
    again = build()
    again.load_state_dict(net.state_dict())
    assert torch.equal(outputs(again, saved['x']), outputs(net, saved['x']))


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('optimizer', ['fused', 'loop'])
def test_a_training_goes_on(saved, channels_last, optimizer):
    """With the momenta of its parameters, whose order is another one, too."""
    net = build()
    options = dict(type='SGD', lr=0.001, momentum=0.9)
    if optimizer == 'loop':
        options.update(foreach=False)
    wrapper = build_optim_wrapper(
        net,
        dict(
            constructor='OREPAOptimWrapperConstructor',
            channels_last=channels_last,
            optimizer=options,
        ),
    )
    net.load_state_dict(saved['state_dict'])
    wrapper.load_state_dict(saved['optimizer'])
    net.train()
    for _ in range(2):
        with wrapper.optim_context(net):
            loss = net(saved['x']).square().mean()
        wrapper.update_params(loss)
    moved = (saved['after'] - saved['before']).abs().max() / saved['after'].abs().max()
    assert moved > 0.1
    assert_near(outputs(net, saved['x']), saved['after'], 1e-4)
    kernels = [m for m in net.modules() if isinstance(m, OREPAKernel)]
    assert len(kernels) == 6
    for kernel in kernels:
        for parameter in kernel.parameters():
            state = wrapper.optimizer.state[parameter]['momentum_buffer']
            assert state.shape == parameter.shape
            assert state.stride() == parameter.stride()
