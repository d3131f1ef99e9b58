"""Convs with channels last in memory: the same numbers, and nobody else notices."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from helpers import assert_near, deployed_twin, trained_like
from mmengine.optim import build_optim_wrapper
from mmpretrain.models.backbones import resnet
from torch import nn
from torch.func import functional_call

from mmorepa import set_channels_last, switch_to_deploy
from mmorepa.backbones import OREPARepVGG, OREPAResNet
from mmorepa.layers import (
    MultiBranchConv2d,
    OREPAConv2d,
    ReparamConv2d,
    RepVGGConv2d,
    faster_in_channels_last,
    folded,
    held,
)

BLOCKS = ['plain', 'orepa', 'dbb', 'repvgg', 'deep_linear']


def has_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


def network(block='orepa', **kwargs):
    net = OREPAResNet(18, block, base_channels=8, out_indices=(0, 3), **kwargs)
    return trained_like(net).eval()


def kernels(net):
    convs = [m for m in net.modules() if isinstance(m, ReparamConv2d)]
    with_kernel = [m for m in convs if not isinstance(m, MultiBranchConv2d)]
    return [conv.kernel() for conv in with_kernel if conv.kernel_size[0] > 1]


@pytest.mark.parametrize('block', BLOCKS)
def test_same_numbers(block):
    net, x = network(block), torch.randn(2, 3, 40, 48)
    expected = net(x)
    assert set_channels_last(net) is net
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_near(copied(x), expected, 1e-4)
        assert all(map(has_channels_last, kernels(copied)))
    inner = []
    net.layer2.register_forward_hook(lambda *args: inner.append(args[-1]))
    assert_near(net(x), expected, 1e-4)
    assert has_channels_last(inner[0]) and not inner[0].is_contiguous()
    assert all(output.is_contiguous() for output in net(x))
    with held(net) as found:
        assert all(has_channels_last(kernel.parameter) for kernel in found)

    set_channels_last(net, False)
    assert all(kernel.is_contiguous() for kernel in kernels(net))
    assert_near(net(x), expected, 1e-4)
    assert not net._forward_hooks


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('depth', [18, 50])
def test_nothing_without_a_call(block, depth):
    """MMCV's operators compute wrong numbers from maps with channels last."""
    net = OREPAResNet(depth, block, base_channels=8)
    maps = []
    for module in net.modules():
        module.register_forward_hook(lambda *args: maps.append(args[-1]))
    x = torch.randn(1, 3, 64, 64)
    for training in (True, False):
        net.train(training)(x)
        with torch.no_grad():
            net(x)
    deployed_twin(net)(x)
    maps = [output for output in maps if isinstance(output, torch.Tensor)]
    maps = [output for output in maps if output.dim() == 4 and len(output) == len(x)]
    assert len(maps) > 80
    assert all(output.is_contiguous() for output in maps)


@pytest.mark.parametrize('block', BLOCKS)
def test_switched_to_deploy(block):
    net, x = set_channels_last(network(block)), torch.randn(1, 3, 40, 40)
    expected = net(x)
    plain = deployed_twin(net)
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 20 and all(has_channels_last(c.weight) for c in convs)
    assert_near(plain(x), expected, 1e-3)


@pytest.mark.parametrize('kind', ['RoIAlign', 'ModulatedDeformConv2dPack'])
def test_operators_of_mmcv(kind):
    """They read memory in the default order, whatever the strides say."""
    ops = pytest.importorskip('mmcv.ops')

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = OREPAConv2d(3, 8, 3, padding=1)
            if kind == 'RoIAlign':
                self.operator = ops.RoIAlign((3, 3), 1.0)
            else:
                self.operator = ops.ModulatedDeformConv2dPack(8, 4, 3, padding=1)
            self.last = nn.Conv2d(8 if kind == 'RoIAlign' else 4, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            boxes = torch.tensor([[0, 1.0, 1, 9, 9], [1, 2, 3, 12, 13]])
            x = self.operator(x, boxes) if kind == 'RoIAlign' else self.operator(x)
            return self.last(x)

    model, x = trained_like(Model()), torch.randn(2, 3, 16, 16)
    expected = model(x)
    expected.square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    set_channels_last(model)
    found = model(x)
    assert_near(found, expected)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, wanted[name], 1e-4)
    set_channels_last(model, False)
    assert not model.operator._forward_pre_hooks


@pytest.mark.parametrize('block', ['plain', 'orepa'])
def test_thin_strided_convs(block):
    """The derivative of these writes beyond its memory where AVX-512 is missing."""
    net = set_channels_last(OREPAResNet(18, block, base_channels=4))
    seen = {}
    for stage in (net.layer2, net.layer3):
        for conv in stage.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1):
                conv.register_forward_pre_hook(
                    lambda conv, args: seen.update({conv.in_channels: args[0]})
                )
    net(torch.randn(2, 3, 32, 32))
    assert seen[4].is_contiguous()
    assert has_channels_last(seen[8]) and not seen[8].is_contiguous()


def test_thin_branches_are_folded_without_a_warning(recwarn):
    model = set_channels_last(nn.Sequential(RepVGGConv2d(3, 8, 3, 2, 1))).eval()
    with folded(model), torch.no_grad():
        assert model[0].evaluation_scope.fused_conv(model[0]) is not None
    assert type(switch_to_deploy(model)[0]) is nn.Conv2d
    assert not [w for w in recwarn if 'hooks on' in str(w.message)]


def test_by_keyword_and_inherited():
    ops = pytest.importorskip('mmcv.ops')

    class Own(ops.RoIAlign):
        pass

    x = torch.randn(1, 4, 12, 12).contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor([[0, 1.0, 1, 9, 9]])
    for align in (ops.RoIAlign((3, 3), 1.0), Own((3, 3), 1.0)):
        expected = align(x.contiguous(), boxes)
        set_channels_last(align)
        assert_near(align(input=x, rois=boxes), expected)


def test_outputs_of_every_kind():
    """A list, a dict, a named tuple: maps in them are contiguous."""
    Maps = namedtuple('Maps', 'one other')

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = OREPAConv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return [y, dict(y=y), Maps(y, 3)]

    first, second, third = set_channels_last(Model())(torch.randn(1, 3, 8, 8))
    assert all(y.is_contiguous() for y in (first, second['y'], third.one))
    assert type(third) is Maps and third.other == 3


def test_a_gradient_that_is_there():
    conv = nn.Conv2d(3, 4, 3)
    conv(torch.randn(1, 3, 8, 8)).sum().backward()
    set_channels_last(conv)
    assert conv.weight.grad.stride() == conv.weight.stride()


class TestDataParallel:
    """Its reducer remembers the order of memory: a later one gives wrong averages."""

    @pytest.fixture
    def wrapped(self, one_process):
        return nn.parallel.DistributedDataParallel(network('plain'))

    def test_refused(self, wrapped):
        with pytest.raises(RuntimeError, match='before the wrapper'):
            set_channels_last(wrapped)
        with pytest.raises(ValueError, match='before the wrapper'):
            wrapper_of(wrapped, channels_last=True)

    def test_left_alone(self, wrapped, log):
        wrapper_of(wrapped)
        assert 'channels last in nothing' in ''.join(log)
        assert wrapped.module.layer1[0].conv1.branches.weight.is_contiguous()


def wrapper_of(net, **options):
    return build_optim_wrapper(
        net,
        dict(
            constructor='OREPAOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.01, momentum=0.9),
            **options,
        ),
    )


def train(net, wrapper, x, steps=3):
    net.train()
    for _ in range(steps):
        with wrapper.optim_context(net):
            loss = net(x)[-1].square().mean()
        wrapper.update_params(loss)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('block', ['plain', 'orepa'])
def test_training(block, folded):
    """Six steps of both layouts, in float64."""
    x, states = torch.randn(4, 3, 32, 32), {}
    for channels_last in (False, True):
        net = OREPAResNet(18, block, base_channels=4)
        net = trained_like(net)
        wrapper = wrapper_of(net, folded=folded, channels_last=channels_last)
        train(net, wrapper, x, steps=6)
        states[channels_last] = net.state_dict()
    for name, value in states[False].items():
        if value.is_floating_point() and value.abs().max() > 0:
            assert_near(states[True][name], value, 1e-8)


@pytest.mark.parametrize('block', ['plain', 'orepa'])
def test_resumed_in_another_layout(block):
    """A fused update takes a parameter and its state for memory of one order."""
    x, results = torch.randn(4, 3, 32, 32), []
    net = trained_like(OREPAResNet(18, block, base_channels=4))
    wrapper = wrapper_of(net, channels_last=False)
    train(net, wrapper, x)
    # Copies, since a load of an optimizer keeps the tensors that it is given.
    state = copy.deepcopy((net.state_dict(), wrapper.state_dict()))
    for channels_last in (False, True):
        net = OREPAResNet(18, block, base_channels=4)
        wrapper = wrapper_of(net, channels_last=channels_last)
        net.load_state_dict(state[0])
        wrapper.load_state_dict(copy.deepcopy(state[1]))
        train(net, wrapper, x, steps=1)
        results.append(dict(net.named_parameters()))
    for name, value in results[0].items():
        assert_near(results[1][name], value, 1e-3)


class TestChoice:
    """What the constructor chooses, and how to choose oneself."""

    def test_networks_of_this_package(self, log):
        for net in (network(), network('plain'), OREPARepVGG('A0')):
            assert faster_in_channels_last(net) == [net]
            wrapper_of(net)
            assert f'channels last in {type(net).__name__}' in ''.join(log)

    def test_backbones(self):
        """A model around them stays as it is."""

        class Detector(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone, self.neck = network(), nn.Conv2d(8, 8, 3)

        model = Detector()
        assert faster_in_channels_last(model) == [model.backbone]
        wrapper_of(model)
        assert model.neck.weight.is_contiguous()
        assert model.backbone.layer1[0].conv1.channels_last

    def test_networks_of_others(self):
        for net in (resnet.ResNet(depth=18), resnet.ResNetV1d(depth=50)):
            assert faster_in_channels_last(net) == [net]

    def test_plugins(self):
        """They may read memory in the default order."""
        plugin = dict(
            cfg=dict(type='ContextBlock', ratio=0.5),
            stages=(True, False, False, False),
            position='after_conv2',
        )
        net = OREPAResNet(50, 'orepa', base_channels=8, plugins=[plugin])
        assert faster_in_channels_last(net) == []

    def test_modules_of_others(self):
        """What is written in a script, or in a resnet.py of somebody."""

        class ResNet(nn.Sequential):
            pass

        for name in ('__main__', 'package.resnet'):
            ResNet.__module__ = name
            assert faster_in_channels_last(ResNet(OREPAConv2d(3, 4, 3))) == []

    @pytest.mark.parametrize('channels_last', [True, False])
    def test_forced(self, channels_last, log):
        net = nn.Sequential(OREPAConv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        wrapper_of(net, channels_last=channels_last)
        assert has_channels_last(net[1].weight) == channels_last
        assert has_channels_last(net[0].kernel()) == channels_last

    def test_unknown(self):
        with pytest.raises(ValueError, match="found 'yes'"):
            wrapper_of(network(), channels_last='yes')


def test_any_strides_of_parameters():
    """As a load by assignment, a copy or a wrapper of the parameters leaves them."""
    conv = trained_like(OREPAConv2d(5, 6, 3, padding=1)).double()
    x = torch.randn(2, 5, 7, 7, dtype=torch.float64)
    expected = conv(x)
    state = {
        name: value.repeat_interleave(2, dim=-1)[..., ::2]
        for name, value in conv.state_dict().items()
    }
    assert_near(functional_call(conv, state, (x,)), expected, 1e-13)
    other = OREPAConv2d(5, 6, 3, padding=1)
    other.load_state_dict(state, assign=True)
    assert_near(other(x), expected, 1e-13)
