import copy
import re

import pytest
import torch
import torchvision
from helpers import assert_checkpointed, assert_near, deployed_twin, trained_like
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa import is_switchable, switch_to_deploy
from mmorepa.backbones import OREPAResNet
from mmorepa.layers import (
    BLOCKS,
    OREPADeepLinearKernel,
    OREPAKernel,
    OREPAPointwiseKernel,
    PlainConv2d,
    PlainKernel,
    ReparamConv2d,
)
from mmorepa.utils.errors import CheckpointError


def tiny(depth=18, **kwargs):
    return OREPAResNet(depth, **{'base_channels': 8, **kwargs})


def image(size=32):
    return torch.randn(2, 3, size, size)


def convs(net):
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, ReparamConv2d)
    }


def on_meta(build):
    with torch.device('meta'):
        return build()


# What is built


def geometry(net, kind):
    """Of every conv, by its name."""
    names = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding')
    names += ('dilation', 'groups')
    return {
        re.sub('^conv1$', 'stem', key.replace('downsample.0', 'downsample')): [
            getattr(conv, name) for name in names
        ]
        for key, conv in net.named_modules()
        if isinstance(conv, kind)
    }


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        *((f'resnet{depth}', dict(depth=depth)) for depth in (18, 34, 50, 101, 152)),
        ('resnext50_32x4d', dict(depth=50, groups=32, width_per_group=4)),
        ('resnext101_32x8d', dict(depth=101, groups=32, width_per_group=8)),
        ('wide_resnet50_2', dict(depth=50, width_per_group=128)),
    ],
)
def test_convs_are_those_of_torchvision(name, options):
    ours = on_meta(lambda: OREPAResNet(**options))
    theirs = on_meta(getattr(torchvision.models, name))
    assert geometry(ours, ReparamConv2d) == geometry(theirs, nn.Conv2d)


@pytest.mark.parametrize(('stem', 'deep_stem'), [('orepa', False), ('dbb', True)])
def test_block_of_the_stem(stem, deep_stem):
    """The rest is plain, and so is the deployed form."""
    net = tiny(block='plain', stem_block=stem, deep_stem=deep_stem)
    kinds = {name: type(conv) for name, conv in convs(net).items()}
    assert kinds['stem.conv1' if deep_stem else 'stem'] is BLOCKS.get(stem)
    assert {k for name, k in kinds.items() if 'stem' not in name} == {PlainConv2d}
    trained_like(net).eval()
    plain = tiny(block='plain', deep_stem=deep_stem, deploy=True).eval()
    plain.load_state_dict(deployed_twin(net).state_dict(), strict=True)
    x = image()
    with torch.no_grad():
        assert_near(plain(x), net(x), 1e-4)


def test_arguments_of_the_stem():
    net = tiny(
        block='plain', stem_block='orepa', stem_block_cfg=dict(branches=['origin'])
    )
    assert net.stem.branches.factors[0].branch_names == ('origin',)
    with pytest.raises(ValueError, match='stem_block'):
        tiny(stem_block_cfg=dict(branches=['origin']))


def test_plain_checkpoint_starts_a_network_with_such_a_stem():
    plain = trained_like(torchvision.models.resnet18()).eval()
    net = OREPAResNet(18, 'plain', stem_block='orepa', out_indices=(3,)).eval()
    plain.fc = nn.Identity()
    net.load_state_dict(plain.state_dict())
    plain.avgpool = nn.Identity()
    x = image(64)
    with torch.no_grad():
        assert_near(net(x)[0].flatten(1), plain(x), 1e-4)


@pytest.mark.parametrize('depth', [18, 50])
def test_kernels_by_place(depth):
    """Only the projection of basic blocks is plain, as in the paper's networks."""
    for name, conv in convs(tiny(depth)).items():
        if name == 'stem':
            expected = OREPADeepLinearKernel
        elif name.endswith('downsample') and depth == 18:
            expected = PlainKernel
        else:
            size = conv.kernel_size[0]
            expected = {1: OREPAPointwiseKernel, 3: OREPAKernel}[size]
        assert type(conv.branches) is expected, name


def test_every_conv_has_its_norm_and_the_right_activations():
    for depth, last in [(18, 'conv2'), (50, 'conv3')]:
        for name, conv in convs(tiny(depth)).items():
            assert isinstance(conv.norm, nn.BatchNorm2d) and conv.bias is None
            # The sum is activated in place of its two terms.
            assert (conv.act is None) == name.endswith((last, 'downsample')), name


@pytest.mark.parametrize(
    ('num_stages', 'out_indices'), [(4, (3,)), (4, (0, 2)), (2, (0, 1)), (1, (0,))]
)
def test_stages_and_outputs(num_stages, out_indices):
    full = trained_like(tiny()).eval()
    net = tiny(num_stages=num_stages, out_indices=out_indices).eval()
    assert len(net.stages) == num_stages
    net.load_state_dict(
        {name: full.state_dict()[name] for name in net.state_dict()}, strict=True
    )
    x = image()
    with torch.no_grad():
        outputs, expected = net(x), full(x)
    assert isinstance(outputs, tuple)
    assert_near(outputs, tuple(expected[i] for i in out_indices))


# Training form and deployed form


@pytest.mark.parametrize(
    'options',
    [
        dict(depth=18),
        dict(depth=50),
        dict(depth=50, groups=4, width_per_group=32),
        dict(depth=18, block='plain'),
        dict(depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), multi_grid=(2, 1)),
        dict(depth=18, norm_cfg=dict(type='GN', num_groups=4)),
        dict(depth=18, act_cfg=dict(type='LeakyReLU')),
    ],
    ids=lambda options: '-'.join(map(str, options.values())),
)
def test_deployed_equals_training_form(options):
    net = trained_like(tiny(**options)).eval()
    x = image()
    with torch.no_grad():
        expected = net(x)
        switched = deployed_twin(net)
        assert_near(switched(x), expected, 1e-4)
        built = tiny(deploy=True, **options).eval()
        assert not is_switchable(built)
        built.load_state_dict(net.state_dict())
        assert_near(built(x), expected, 1e-4)
    assert list(built.state_dict()) == list(switched.state_dict())
    for conv in convs(switched).values():
        assert not any('branches' in name for name in conv.state_dict())


# Training options


def batch_norms(net):
    return {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm)}


@pytest.mark.parametrize(
    ('frozen_stages', 'deploy'),
    [(-1, False), (0, False), (2, False), (4, False), (1, True)],
)
def test_frozen_stages(frozen_stages, deploy):
    net = tiny(frozen_stages=frozen_stages, deploy=deploy)
    frozen = tuple(
        f'{name}.' for name in ['stem', *net.stage_names][: frozen_stages + 1]
    )
    for _ in range(2):
        net.eval().train()
        before = copy.deepcopy(net.state_dict())
        outputs = net(image())
        if frozen_stages < 4:
            outputs[-1].sum().backward()
        for name, parameter in net.named_parameters():
            is_frozen = name.startswith(frozen)
            assert parameter.requires_grad != is_frozen, name
            assert (parameter.grad is None) == is_frozen, name
        for name, norm in batch_norms(net).items():
            moved = not torch.equal(norm.running_mean, before[f'{name}.running_mean'])
            assert moved != name.startswith(frozen), name


def test_norm_eval():
    net = tiny(norm_eval=True).train()
    assert net.training and net.stem.training
    before = copy.deepcopy(net.state_dict())
    net(image())[-1].sum().backward()
    norms = batch_norms(net)
    assert len(norms) == 20
    for name, norm in norms.items():
        assert torch.equal(norm.running_mean, before[f'{name}.running_mean'])
        assert norm.weight.grad is not None


def test_norm_eval_without_statistics(log):
    """One warning for all epochs, and none where statistics were loaded."""
    net = tiny(norm_eval=True)
    net.eval()
    assert not log
    net.train().train()
    (text,) = log
    assert text.startswith('norm_eval=True keeps BatchNorm statistics that nothing')
    assert text.endswith('set model.backbone.norm_eval=False')

    trained_like(tiny(norm_eval=True)).train()
    tiny().train()
    tiny(norm_eval=True, deploy=True).train()
    on_meta(lambda: tiny(norm_eval=True)).train()
    assert log == [text]


def test_with_cp():
    net, twin = trained_like(tiny(50)).train(), tiny(50, with_cp=True).train()
    assert_checkpointed(net, twin, twin.layer3[0].conv1, image())


@pytest.mark.parametrize(
    ('block', 'depth', 'last'),
    [('orepa', 18, 'conv2'), ('plain', 18, 'conv2'), ('dbb', 50, 'conv3')],
)
def test_zero_init_residual(block, depth, last):
    """Every residual block starts as its shortcut."""
    options = dict(block=block, num_stages=2, out_indices=(1,))
    net = tiny(depth, zero_init_residual=True, **options)
    net.init_weights()
    for stage in net.stages:
        for residual in stage:
            for name, conv in residual.named_children():
                if isinstance(conv, ReparamConv2d):
                    x = torch.randn(2, conv.in_channels, 8, 8)
                    assert conv(x).any() != (name == last), name
    tiny(depth, zero_init_residual=True, deploy=True, **options).init_weights()


# Pretrained weights


@pytest.fixture
def checkpoints(tmp_path):
    """A network, and files with its backbone, a whole model and its deployed form."""
    net = trained_like(tiny()).eval()
    state = net.state_dict()
    whole = {f'backbone.{name}': value for name, value in state.items()}
    whole['head.fc.bias'] = torch.zeros(2)
    states = dict(backbone=state, model=whole, deployed=deployed_twin(net).state_dict())
    for name, content in states.items():
        torch.save(dict(state_dict=content), tmp_path / f'{name}.pth')
    return net, {name: str(tmp_path / f'{name}.pth') for name in states}


@pytest.mark.parametrize(
    ('name', 'prefix', 'deploy'),
    [
        *(('backbone', {}, deploy) for deploy in (False, True)),
        *(('model', dict(prefix='backbone.'), deploy) for deploy in (False, True)),
        *(('model', {}, deploy) for deploy in (False, True)),
        ('deployed', {}, True),
    ],
)
def test_pretrained(checkpoints, name, prefix, deploy):
    net, paths = checkpoints
    init_cfg = dict(type='Pretrained', checkpoint=paths[name], **prefix)
    # The checkpoint's last norms win over the zeros.
    other = tiny(deploy=deploy, init_cfg=init_cfg, zero_init_residual=True).eval()
    other.init_weights()
    x = image()
    with torch.no_grad():
        assert_near(other(x), net(x), 1e-4)


def test_pretrained_of_a_deployed_network(checkpoints):
    init_cfg = dict(type='Pretrained', checkpoint=checkpoints[1]['deployed'])
    with pytest.raises(RuntimeError, match='deployed'):
        tiny(init_cfg=init_cfg).init_weights()


def test_training_form_into_plain_convs():
    """MMEngine would say that keys are left over, and go on."""
    state, switched = tiny().state_dict(), switch_to_deploy(tiny())
    for load in (nn.Module.load_state_dict, load_state_dict):
        with pytest.raises(CheckpointError, match='stem became a plain conv by'):
            load(switched, dict(state))
    switched.load_state_dict(tiny(deploy=True).state_dict())


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(depth=34), 'keys missing: .*layer1.2.conv1'),
        (dict(depth=50), 'keys missing: .*layer1.0.conv3'),
        (dict(num_stages=2, out_indices=(1,)), ''),
        (dict(base_channels=16), 'size mismatch for stem.norm.*, and .* more'),
        (dict(block='dbb'), 'keys missing: .*layer1.0.conv1'),
    ],
)
def test_pretrained_of_another_network(checkpoints, options, words):
    """MMEngine would warn, and leave what does not fit at its random values."""
    init_cfg = dict(type='Pretrained', checkpoint=checkpoints[1]['model'])
    net = tiny(**{'init_cfg': init_cfg, **options})
    if not words:
        net.init_weights()
        return
    with pytest.raises(CheckpointError, match=f'does not fit this OREPA.*{words}'):
        net.init_weights()
    net.load_state_dict({'stem.norm.bias': net.stem.norm.bias}, strict=False)


# Bad input


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(depth=20), 'depth 20'),
        (dict(block='dbbb'), 'dbbb'),
        (dict(num_stages=0), 'num_stages'),
        (dict(num_stages=2), 'out_indices'),
        (dict(out_indices=(4,)), 'out_indices'),
        (dict(strides=(1, 2)), 'strides'),
        (dict(dilations=(1, 2)), 'dilations'),
        (dict(frozen_stages=5), 'frozen_stages'),
        (dict(multi_grid=(1, 2, 4)), '2 blocks'),
        (dict(groups=32), 'groups=32'),
        (dict(width_per_group=4), 'width_per_group=4'),
        (dict(width_mult=0.1), 'width_mult=0.1'),
        (dict(depth=50, groups=32, width_per_group=4), 'no channel'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        on_meta(lambda: tiny(**options))
