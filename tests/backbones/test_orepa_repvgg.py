import pytest
import torch
from helpers import assert_checkpointed, assert_near, deployed_twin, trained_like
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa.backbones import OREPARepVGG
from mmorepa.layers import OREPARepVGGConv2d, PlainConv2d

SLIM = dict(num_blocks=(1, 2, 2, 1), widths=(0.75, 1, 1, 2.5))


def tiny(arch=None, **kwargs):
    return OREPARepVGG(arch or SLIM, **{'base_channels': 8, **kwargs})


def image(size=64):
    return torch.randn(2, 3, size, size)


def convs(net):
    return [block.conv for stage in [[net.stem], *net.stages] for block in stage]


# Blocks and widths of each stage, from the papers; the stem comes before.


def test_strides_dilations_and_outputs():
    net = tiny(strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(1, 3)).eval()
    dilations = [[block.conv.dilation[0] for block in stage] for stage in net.stages]
    assert dilations == [[1], [1, 1], [2, 2], [4]]
    with torch.no_grad():
        assert [y.shape[-1] for y in net(image())] == [8, 8]


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(block='repvgg'),
        dict(block='dbb'),
        dict(block='plain'),
        dict(block='plain', stem_block='orepa'),
        dict(stem_block='dbb', stem_block_cfg=dict(single_init=True)),
        dict(arch=dict(SLIM, groups=2, use_se=True)),
        dict(strides=(2, 2, 1, 1), dilations=(1, 1, 2, 4)),
        dict(norm_cfg=dict(type='SyncBN'), act_cfg=dict(type='PReLU')),
        dict(arch='A0', base_channels=4, out_indices=(3,)),
    ],
    ids=lambda options: '-'.join(options) or 'default',
)
def test_deployed_equals_training_form(options):
    net = trained_like(tiny(**options)).eval()
    x = image()
    with torch.no_grad():
        expected = net(x)
        switched = deployed_twin(net)
        assert_near(switched(x), expected, 1e-4)
        built = tiny(deploy=True, **options).eval()
        built.load_state_dict(net.state_dict())
        assert_near(built(x), expected, 1e-4)
    kinds = [type(m) for m in switched.modules() if not list(m.children())]
    assert not any(issubclass(kind, _BatchNorm) for kind in kinds)


def test_block_of_the_stem():
    """The rest is plain; an OREPA stem is one of a RepVGG block, as with ``block``."""
    net = tiny(block='plain', stem_block='orepa')
    stem, *others = map(type, convs(net))
    assert stem is OREPARepVGGConv2d
    assert {*others} == {PlainConv2d}
    with pytest.raises(ValueError, match='stem_block'):
        tiny(stem_block_cfg=dict(single_init=True))


def test_block_is_the_formula():
    """ReLU of the sum, with squeeze-excitation in between."""
    net = trained_like(tiny(dict(SLIM, use_se=True))).eval()
    block = net.layer2[1]
    x = torch.randn(2, 16, 8, 8)
    branches = block.conv.branches
    assert list(branches) == ['origin', 'pointwise', 'identity']
    y = sum(branch(x) for branch in branches.values())
    gate = block.se.down(nn.functional.adaptive_avg_pool2d(y, 1))
    y = y * torch.sigmoid(block.se.up(torch.relu(gate)))
    assert_near(block(x), torch.relu(y))


def test_gradients_and_checkpointing():
    net, twin = trained_like(tiny()).train(), tiny(with_cp=True).train()
    assert_checkpointed(net, twin, twin.layer2[1].conv, image())
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='A9'), 'A9'),
        (dict(arch=dict(num_blocks=(1,) * 4)), 'widths'),
        (dict(arch=dict(SLIM, num_blocks=(1, 2))), 'num_blocks'),
        (dict(arch=dict(SLIM, group=2)), 'group'),
        (dict(arch=3), 'found 3'),
        (dict(base_channels=1), 'stage 1'),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
