import re

import pytest
import torch
from mmcv.cnn import build_conv_layer
from mmengine.registry import MODELS
from torch import nn

from mmorepa.layers import BLOCKS, PlainConv2d, ReparamConv2d, build_conv

# By kernel size: 1, 3 and 5, 7 and more.


def test_block_cfg_is_for_the_convs_of_the_block_alone():
    cfg = dict(block_cfg=dict(branches=['origin']))
    assert build_conv('dbb', 4, 6, 3, padding=1, **cfg).branches.keys() == {'origin'}
    assert type(build_conv('dbb', 4, 6, 1, **cfg)) is PlainConv2d


@pytest.mark.parametrize('block', ['OREPA', 'dbbb', '', None, ['orepa'], {}])
def test_unknown_block(block):
    message = f'unknown block {re.escape(repr(block))}; choose one of .*plain.*orepa'
    with pytest.raises(ValueError, match=message):
        build_conv(block, 4, 6, 3)


def test_a_block_type_of_ones_own(registries):
    class Sum(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.first = nn.Parameter(torch.randn(*shape))
            self.second = nn.Parameter(torch.randn(*shape))

        def forward(self):
            return self.first + self.second

    @BLOCKS.register_module('sum')
    class SumConv2d(ReparamConv2d):
        def build_branches(self):
            inputs = self.in_channels // self.groups
            return Sum(self.out_channels, inputs, *self.kernel_size)

    # What the block type has no conv of its own for stays plain.
    kinds = [type(build_conv('sum', 4, 6, k)) for k in (1, 3, 5, 7, 9)]
    plain = [PlainConv2d]
    assert kinds == [*plain, SumConv2d, SumConv2d, *plain, *plain]
    # A type of conv_cfg, for all sizes.
    conv = build_conv_layer(dict(type='SumConv2d'), 4, 6, 1)
    assert type(conv) is SumConv2d
    with pytest.raises(KeyError, match='sum is already registered'):
        BLOCKS.register_module('sum', module=SumConv2d)
    BLOCKS.register_module('total', module=SumConv2d)  # A second name.
    assert type(build_conv('total', 4, 6, 3)) is SumConv2d
    options = dict(groups=2, norm_cfg=dict(type='BN'))
    conv = build_conv('sum', 4, 6, 3, **options).eval()
    x = torch.randn(1, 4, 8, 8)
    expected = conv(x)
    deployed = build_conv('sum', 4, 6, 3, deploy=True, **options)
    deployed.load_state_dict(conv.state_dict())
    torch.testing.assert_close(deployed(x), expected)


def test_a_class_name_that_is_taken_is_not_registered(registries):
    before = [dict(registry.module_dict) for registry in (BLOCKS, MODELS)]
    with pytest.raises(KeyError, match='DBBConv2d is already'):
        BLOCKS.register_module('odd', module=type('DBBConv2d', (ReparamConv2d,), {}))
    assert [BLOCKS.module_dict, MODELS.module_dict] == before
