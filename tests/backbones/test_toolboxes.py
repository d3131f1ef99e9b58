"""Networks of mmpretrain, mmdet and mmseg, beside ours and with our convs inside."""

import pytest
import torch
from helpers import assert_near, deployed_twin, import_models, trained_like
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmorepa.backbones import OREPAResNet
from mmorepa.layers import ReparamConv2d

OREPA = dict(type='OREPAConv2d')
SCOPES = ['mmpretrain', 'mmdet', 'mmseg']


def registry(scope):
    import_models(scope)
    models = import_modules_from_strings(f'{scope}.registry').MODELS
    # What is imported under another default scope registers elsewhere.
    models.import_from_location()
    return models


@pytest.mark.parametrize('scope', SCOPES)
def test_bare_type_in_every_scope(scope):
    models = registry(scope)
    cfg = dict(type='OREPAResNet', depth=18, base_channels=8)
    assert isinstance(models.build(cfg), OREPAResNet)
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(models.build(cfg), OREPAResNet)


def geometry(net):
    return {
        name: (c.stride, c.padding, c.dilation, c.in_channels, c.out_channels)
        for name, c in net.named_modules()
        if isinstance(c, nn.Conv2d) and name.startswith('layer')
    }


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
        dict(strides=(2, 1, 2, 1), dilations=(1, 3, 1, 5), contract_dilation=True),
        'multi_grid',
        dict(num_stages=3, out_indices=(2,), strides=(1, 2, 1), dilations=(1, 1, 2)),
    ],
    ids=str,
)
def test_strides_and_dilations_are_those_of_mmseg(depth, options):
    if options == 'multi_grid':
        options = dict(
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            contract_dilation=True,
            multi_grid=(1, 2) if depth == 18 else (1, 2, 4),
        )
    models = registry('mmseg')
    with torch.device('meta'):
        theirs = models.build(dict(type='mmseg.ResNet', depth=depth, **options))
        ours = OREPAResNet(depth, block='plain', **options)
    expected = geometry(theirs)
    expected = {n.replace('downsample.0', 'downsample'): g for n, g in expected.items()}
    assert geometry(ours) == expected


NETWORKS = [
    ('mmpretrain', dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)),
    ('mmdet', dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)),
    (
        'mmseg',
        dict(
            type='ResNetV1c',
            depth=50,
            base_channels=8,
            stem_channels=8,
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            contract_dilation=True,
            multi_grid=(1, 2, 4),
        ),
    ),
]


@pytest.mark.parametrize(('scope', 'cfg'), NETWORKS, ids=str)
def test_conv_cfg_in_stock_networks(scope, cfg):
    models = registry(scope)
    cfg = dict(cfg, type=f'{scope}.{cfg["type"]}', out_indices=(0, 1, 2, 3))
    net = models.build(dict(cfg, conv_cfg=OREPA))
    check_stock_network(net, models.build(cfg))


def check_stock_network(net, stock):
    """Deployed, ``net`` is the stock network with other weights."""
    plain = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert plain and all(isinstance(m, ReparamConv2d) for m in plain)
    for module in [net] if isinstance(net, BaseModule) else net.children():
        module.init_weights()
    trained_like(net).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        deployed = deployed_twin(net)
        assert_near(deployed(x), expected, 1e-4)
        assert list(deployed.state_dict()) == list(stock.state_dict())
        stock.load_state_dict(deployed.state_dict(), strict=True)
        stock.eval()  # returns None in some of them
        assert_near(stock(x), expected, 1e-4)
