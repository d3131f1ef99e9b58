from pathlib import Path

import pytest
import torch
from helpers import settings_by_name
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from runners import TinyClassifier
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa.layers import DBBConv2d, OREPAConv2d

CONFIGS = Path(__file__).parents[2] / 'configs'
RECIPE = dict(
    norm_decay_mult=0.0, bias_decay_mult=0.0, bias_lr_mult=2.0, norm_bias_lr_mult=2.0
)


def wrapper_of(model, constructor='OREPAOptimWrapperConstructor', **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
            constructor=constructor,
            paramwise_cfg=paramwise,
        ),
    )


def recipe_by_name(model, lr=0.1, decay=1e-4):
    """The published recipe, parameter by parameter, from names and types alone."""
    of_norms = {
        f'{prefix}.{name}'
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    return {
        name: (
            2 * lr if name.endswith('bias') else lr,
            0.0 if name.endswith('bias') or name in of_norms else decay,
        )
        for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize(
    'name',
    ['resnet50-orepa', 'resnet18-dbb', 'repvgg-a0-orepa'],
)
def test_recipe_of_the_configs(name):
    cfg = Config.fromfile(CONFIGS / f'imagenet/{name}_4xb64_in1k.py')
    pytest.importorskip('mmpretrain')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.base_channels = 4
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    expected = recipe_by_name(model)
    assert settings_by_name(model, wrapper) == expected

    # The settings that the paper names, on parameters that surely have a role.
    norm = next(n for n, m in model.named_modules() if isinstance(m, _BatchNorm))
    assert expected[f'{norm}.weight'] == (0.1, 0.0)
    assert expected[f'{norm}.bias'] == expected['head.fc.bias'] == (0.2, 0.0)
    assert expected['head.fc.weight'] == (0.1, 1e-4)
    if 'orepa' in name:
        scales = [key for key in expected if key.endswith('.scale')]
        assert len(scales) > 15
        assert {expected[key] for key in scales} == {(0.1, 1e-4)}

    groups = wrapper.optimizer.param_groups
    assert len(groups) == 3
    assert {(g['momentum'], g['nesterov']) for g in groups} == {(0.9, False)}


class Various(nn.Module):
    """One of each kind that MMEngine's options know."""

    def __init__(self):
        super().__init__()
        self.conv = OREPAConv2d(4, 4, 3, norm_cfg=dict(type='BN'))
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.instance_norm = nn.InstanceNorm2d(4, affine=True)
        self.plain_norm = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 2)
        self.gamma = nn.Parameter(torch.ones(4))


OPTIONS = [
    dict(bias_lr_mult=3.0),
    dict(bias_decay_mult=0.5),
    dict(norm_decay_mult=0.5),
    dict(dwconv_decay_mult=0.1),
    dict(flat_decay_mult=0.0),
    dict(custom_keys={'head': dict(lr_mult=10.0), 'conv.b': dict(decay_mult=0.0)}),
    dict(bypass_duplicate=True),
    dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.2,
        bias_lr_mult=2.0,
        dwconv_decay_mult=0.1,
        flat_decay_mult=0.3,
        custom_keys={'layer_norm': dict(lr_mult=0.3, decay_mult=7.0)},
    ),
]


@pytest.mark.parametrize('options', OPTIONS)
def test_options_of_mmengine(options):
    """They mean what they mean in MMEngine."""
    model = Various()
    expected = settings_by_name(
        model, wrapper_of(model, 'DefaultOptimWrapperConstructor', **options)
    )
    assert settings_by_name(model, wrapper_of(model, **options)) == expected
    assert expected.keys() == dict(model.named_parameters()).keys()


def test_frozen_parameters(log):
    model = TinyClassifier()
    model.conv1.requires_grad_(False)
    found = settings_by_name(model, wrapper_of(model, **RECIPE))
    expected = recipe_by_name(model)
    assert any(name.startswith('conv1.') for name in expected)
    assert found == {k: v for k, v in expected.items() if not k.startswith('conv1.')}
    # One table, not a line for each tensor, and how this trains.
    text, _ = log
    assert f'{len(list(model.conv1.parameters()))} tensors are frozen' in text


def test_shared_parameter():
    model = nn.ModuleDict(dict(a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    model['b'].weight = model['a'].weight
    with pytest.raises(ValueError, match=r"share the parameter 'a.weight'"):
        wrapper_of(model, bias_lr_mult=2.0)
    found = settings_by_name(
        model, wrapper_of(model, bias_lr_mult=2.0, bypass_duplicate=True)
    )
    assert found == {
        'a.weight': (0.1, 1e-4),
        'a.bias': (0.2, 1e-4),
        'b.bias': (0.2, 1e-4),
    }


@pytest.mark.parametrize(
    ('model', 'options', 'expected'),
    [
        (
            TinyClassifier,
            {},
            'FoldedOptimWrapper: 2 kernels folded outside of the graph',
        ),
        (TinyClassifier, dict(folded=False), 'OptimWrapper: 2 kernels folded online'),
        (lambda: nn.Linear(2, 2), {}, 'OptimWrapper: no kernels to fold'),
        (lambda: DBBConv2d(2, 2, 3, padding=1), {}, 'OptimWrapper: no kernels to fold'),
    ],
)
def test_says_how_it_trains(log, model, options, expected):
    cfg = dict(
        optimizer=dict(type='SGD', lr=0.1),
        constructor='OREPAOptimWrapperConstructor',
        **options,
    )
    build_optim_wrapper(model(), cfg)
    assert log[-1].startswith(expected)
    assert 'SGD fused' in log[-1]


def test_online_contradicts_a_folded_wrapper():
    cfg = dict(type='FoldedOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    cfg.update(constructor='OREPAOptimWrapperConstructor', folded=False)
    with pytest.raises(ValueError, match='contradicts'):
        build_optim_wrapper(OREPAConv2d(3, 4, 3), cfg)


def test_capture_needs_a_folded_form():
    cfg = dict(type='ApexOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    cfg.update(constructor='OREPAOptimWrapperConstructor', capture=True)
    with pytest.raises(ValueError, match="'ApexOptimWrapper' has no folded form"):
        build_optim_wrapper(OREPAConv2d(3, 4, 3), cfg)


@pytest.mark.parametrize(
    ('optimizer', 'expected'),
    [
        (dict(type='SGD', lr=0.1), True),
        (dict(type='AdamW', lr=0.1), True),
        (dict(type=torch.optim.SGD, lr=0.1), True),
        (dict(type='SGD', lr=0.1, fused=False), False),
        (dict(type='SGD', lr=0.1, foreach=True), None),
        (dict(type='RMSprop', lr=0.1), 'not an option'),
        (dict(type='AdamW', lr=0.1, differentiable=True), None),
    ],
)
def test_fused_where_it_can_be(optimizer, expected):
    model = nn.Sequential(OREPAConv2d(3, 4, 3), nn.BatchNorm2d(4))
    wrapper = build_optim_wrapper(
        model,
        dict(optimizer=optimizer, constructor='OREPAOptimWrapperConstructor'),
    )
    assert wrapper.optimizer.defaults.get('fused', 'not an option') is expected
