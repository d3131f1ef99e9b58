"""The options of OREPAResNet that the toolboxes' ResNets have too."""

import pytest
import torch
from helpers import (
    assert_checkpointed,
    assert_near,
    deployed_twin,
    import_models,
    last_map,
    trained_like,
)
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmorepa import is_switchable, switch_to_deploy
from mmorepa.backbones import OREPAResNet
from mmorepa.layers import OREPAConv2d, PlainConv2d
from mmorepa.utils.errors import CheckpointError

C, D = dict(deep_stem=True), dict(deep_stem=True, avg_down=True)
SHORT = dict(depth=50, num_stages=2, out_indices=(1,))
CONTEXT = dict(type='ContextBlock', ratio=0.25)
PLUGINS = [
    dict(cfg=CONTEXT, position='after_conv1', stages=(False, True, True, False)),
    dict(cfg=dict(CONTEXT, postfix='_2'), position='after_conv2'),
]


def tiny(depth=18, **options):
    return OREPAResNet(depth, **{'base_channels': 8, **options})


def image(dtype=torch.float32):
    # Of odd maps, whose pools and strides end at the border.
    return torch.randn(2, 3, 53, 53, dtype=dtype)


def stock(scope, kind, **options):
    import_models(scope)
    init_default_scope(scope)
    cfg = dict(type=f'{scope}.{kind}', base_channels=8, stem_channels=8, **options)
    net = trained_like(MODELS.build(cfg)).double()
    net.eval()  # Returns None in some of them.
    return net


# Training form and deployed form


@pytest.mark.parametrize(
    'options',
    [
        dict(C),
        dict(D, **SHORT),
        dict(D, block='dbb'),
        dict(style='caffe', **SHORT),
        dict(stem_channels=12),
        dict(drop_path_rate=0.5, **SHORT),
        dict(plugins=PLUGINS),
        dict(block='deep_linear', block_cfg=dict(inner_mult=2)),
    ],
    ids=str,
)
def test_deployed_equals_training_form(options):
    net, x = trained_like(tiny(**options)), image()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for steps in (0, 3):
        for _ in range(steps):
            optimizer.zero_grad()
            net.train()(x)[-1].square().mean().backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            expected = net(x)
            assert_near(deployed_twin(net)(x), expected, 1e-4)
    deployed = tiny(deploy=True, **options).eval()
    assert not is_switchable(deployed)
    deployed.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert_near(deployed(x), expected, 1e-4)
    assert list(deployed.state_dict()) == list(switch_to_deploy(net).state_dict())


@pytest.mark.parametrize('depth', [18, 50])
def test_gradients_reach_every_parameter(depth):
    net = trained_like(tiny(depth, drop_path_rate=0.01, **D)).train()
    sum(y.square().mean() for y in net(image())).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# Blocks


@pytest.mark.parametrize('block', ['orepa', 'plain'])
def test_deep_stem(block):
    net = tiny(stem_channels=12, block=block, width_mult=2, **D)
    kind = OREPAConv2d if block == 'orepa' else PlainConv2d
    assert [type(conv) for conv in net.stem] == [kind] * 3
    assert [conv.out_channels for conv in net.stem] == [12, 12, 24]
    assert [conv.stride[0] for conv in net.stem] == [2, 1, 1]
    assert all(conv.act is not None and conv.norm is not None for conv in net.stem)
    assert net.layer1[0].in_channels == 24 and net.layer1[0].out_channels == 16


# Stochastic depth


def test_rates_of_drop_path():
    """From none in the first block of all stages to the given one in the last."""
    net = tiny(num_stages=3, out_indices=(2,), drop_path_rate=0.7)
    drops = [block.drop_path for stage in net.stages for block in stage]
    assert isinstance(drops[0], nn.Identity)
    rates = [drop.drop_prob for drop in drops[1:]]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert not any(isinstance(m, DropPath) for m in tiny().modules())


def test_drop_path_drops_samples():
    block = trained_like(tiny(drop_path_rate=0.5).layer4[1]).train()
    x = torch.randn(16, 64, 6, 6)
    with torch.no_grad():
        y = block(x)
        branch = block.conv2(block.conv1(x))
    kept = (y - x.relu()).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert 0 < kept.sum() < 16
    assert_near(y[kept], (x + 2 * branch)[kept].relu())
    assert_near(y[~kept], x[~kept].relu())


def test_with_cp_drops_the_same_samples():
    options = dict(drop_path_rate=0.6)
    net, twin = trained_like(tiny(**options)).train(), tiny(with_cp=True, **options)
    assert_checkpointed(net, twin.train(), twin.layer3[0].conv1, image())


# Plugins


def test_plugins_are_where_mmdet_has_them():
    init_default_scope('mmengine')
    plugins = [
        dict(cfg=dict(CONTEXT, postfix=''), position='after_conv3'),
        dict(cfg=dict(CONTEXT, postfix='_1'), position='after_conv3'),
        *PLUGINS[1:],
    ]
    block = tiny(50, plugins=plugins).layer2[1]
    assert block.path == [
        *('conv1', 'conv2', 'context_block_2'),
        *('conv3', 'context_block', 'context_block_1'),
    ]
    assert block.context_block_2.in_channels == 16
    assert block.context_block.in_channels == 64
    first = tiny(plugins=PLUGINS).layer1[0]
    assert first.path == ['conv1', 'conv2', 'context_block_2']


def test_plugins_stay_as_they_are_where_the_checkpoint_has_none():
    """Also those of our convs, without a norm."""
    attention = dict(type='NonLocal2d', conv_cfg=dict(type='OREPAConv2d'))
    net = tiny(block='dbb', plugins=[dict(cfg=attention, position='after_conv2')])
    plain = stock('mmpretrain', 'ResNet', depth=18)
    keys = net.load_state_dict(plain.state_dict(), strict=False)
    assert keys.missing_keys and not keys.unexpected_keys
    assert all('.nonlocal_block.' in key for key in keys.missing_keys)


# Plain checkpoints


SOURCES = [
    ('mmpretrain', 'ResNetV1c', 18, C),
    ('mmpretrain', 'ResNetV1d', 50, D),
    ('mmpretrain', 'ResNet', 50, dict(style='caffe')),
    ('mmpretrain', 'ResNet', 50, dict(avg_down=True)),
    ('mmdet', 'ResNet', 50, dict(plugins=PLUGINS, style='caffe')),
    ('mmdet', 'ResNetV1d', 18, D),
    ('mmseg', 'ResNetV1c', 50, C),
]


@pytest.mark.parametrize(('scope', 'kind', 'depth', 'options'), SOURCES, ids=str)
def test_start_from_a_stock_network(scope, kind, depth, options):
    block = 'orepa' if depth == 18 else 'dbb'
    given = {} if kind.startswith('ResNetV1') else options
    plain, x = stock(scope, kind, depth=depth, **given), image(torch.float64)
    expected = last_map(plain, x)
    for deploy in (False, True):
        # A deep linear stem of 8 channels cannot be any 7x7 kernel.
        wide = dict(inner_mult=4) if block == 'orepa' else {}
        net = tiny(depth, block=block, block_cfg=wide, deploy=deploy, **options)
        keys = net.double().eval().load_state_dict(plain.state_dict(), strict=False)
        assert not keys.missing_keys and not keys.unexpected_keys
        assert_near(last_map(net, x), expected, 1e-9)


def test_own_checkpoints_of_another_shortcut():
    """Nothing but the keys tells them apart."""
    state = tiny(avg_down=True).state_dict()
    with pytest.raises(RuntimeError, match='layer2.0.downsample.conv'):
        tiny().load_state_dict(state)


@pytest.mark.parametrize(
    ('style', 'checkpoint', 'message'),
    [
        ('pytorch', 'open-mmlab://detectron2/resnet50_caffe', "set style='caffe'"),
        ('pytorch', 'https://there.com/resnet50_msra-5891d200.pth', "style='caffe'"),
        ('caffe', 'torchvision://resnet50', "3x3 conv: set style='pytorch'"),
    ],
)
def test_style_by_the_name_of_the_checkpoint(style, checkpoint, message):
    init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        tiny(50, style=style, init_cfg=init_cfg).init_weights()
    assert '\n' not in str(error.value)


# Defaults


# Bad input


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(style='tensorflow'), 'style'),
        (dict(drop_path_rate=1), 'probability'),
        (dict(stem_channels=0), 'the stem'),
        (dict(C, stem_channels=1), 'deep stem'),
        (dict(block_cfg=dict(inner_mult=0.1)), 'inner_mult=0.1'),
        (dict(plugins=[dict(cfg=CONTEXT)]), 'position'),
        (dict(plugins=[dict(PLUGINS[0], stage=(True,))]), "argument 'stage'"),
        (dict(plugins=[dict(cfg=CONTEXT, position='after_conv3')]), 'after_conv3'),
        (dict(plugins=[dict(PLUGINS[0], stages=(True, False))]), '4 stages'),
        (dict(plugins=[PLUGINS[0]] * 2), 'postfix'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_bad_input(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(**options)
