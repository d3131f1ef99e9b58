import logging
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from runners import TinyClassifier
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa.layers import OREPAConv2d

CONFIGS = Path(__file__).parents[2] / 'configs'
RECIPE = dict(
    norm_decay_mult=0.0, bias_decay_mult=0.0, bias_lr_mult=2.0, norm_bias_lr_mult=2.0
)
RECIPE_OF_MMENGINE = {k: v for k, v in RECIPE.items() if k != 'norm_bias_lr_mult'}


def wrapper_of(model, constructor='OREPAOptimWrapperConstructor', **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
            constructor=constructor,
            paramwise_cfg=paramwise,
        ),
    )


def settings_by_name(model, wrapper):
    """(learning rate, weight decay) of every parameter that is optimised."""
    names = {id(param): name for name, param in model.named_parameters()}
    found = {}
    for group in wrapper.optimizer.param_groups:
        for param in group['params']:
            name = names[id(param)]
            assert name not in found, f'{name} is in two groups'
            found[name] = group['lr'], group['weight_decay']
    return found


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


@pytest.fixture
def log():
    """What MMEngine's logger is told."""

    class Handler(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    texts = []
    logger, handler = MMLogger.get_current_instance(), Handler(logging.INFO)
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    'name',
    ['resnet18-orepa', 'resnet50-orepa', 'resnet18', 'resnet18-dbb', 'repvgg-a0-orepa'],
)
def test_recipe_of_the_configs(name, log):
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
    (text,) = log
    assert text.startswith('Parameter groups (0 tensors are frozen')
    assert len(text.splitlines()) == 2 + 3
    total = sum(p.numel() for p in model.parameters())
    counts = [int(line.split()[-3].replace(',', '')) for line in text.splitlines()[2:]]
    assert sum(counts) == total


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


@pytest.mark.parametrize('options', OPTIONS)
def test_biases_of_norms_with_options_of_mmengine(options):
    """The multiplier is on top of the others, also of a custom key."""
    model = Various()
    expected = settings_by_name(
        model, wrapper_of(model, 'DefaultOptimWrapperConstructor', **options)
    )
    norms = ('conv.norm', 'group_norm', 'layer_norm', 'instance_norm')
    for name in norms:
        lr, decay = expected[f'{name}.bias']
        expected[f'{name}.bias'] = 5 * lr, decay
    found = settings_by_name(model, wrapper_of(model, norm_bias_lr_mult=5.0, **options))
    assert found == {k: pytest.approx(v) for k, v in expected.items()}


def test_options_of_custom_keys_reach_the_optimizer():
    model = Various()
    wrapper = wrapper_of(model, custom_keys={'head': dict(momentum=0.5)})
    momenta = {
        id(param): group['momentum']
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    assert momenta.pop(id(model.head.weight)) == 0.5
    assert momenta.pop(id(model.head.bias)) == 0.5
    assert set(momenta.values()) == {0.9}


def test_without_options():
    model = Various()
    found = settings_by_name(model, wrapper_of(model))
    assert found == dict.fromkeys(dict(model.named_parameters()), (0.1, 1e-4))


def test_multiplier_that_fits_nothing():
    model = nn.Sequential(OREPAConv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match='norm_bias_lr_mult=2.0 has no effect'):
        wrapper_of(model, norm_bias_lr_mult=2.0)


def test_multiplier_that_fits_frozen_parameters_only():
    model = TinyClassifier()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)
    with pytest.raises(ValueError, match='norm_bias_lr_mult=2.0 has no effect'):
        wrapper_of(model, norm_bias_lr_mult=2.0)


def test_frozen_parameters(log):
    model = TinyClassifier()
    model.conv1.requires_grad_(False)
    found = settings_by_name(model, wrapper_of(model, **RECIPE))
    expected = recipe_by_name(model)
    assert any(name.startswith('conv1.') for name in expected)
    assert found == {k: v for k, v in expected.items() if not k.startswith('conv1.')}
    (text,) = log
    frozen = len(list(model.conv1.parameters()))
    assert text.startswith(f'Parameter groups ({frozen} tensors are frozen')


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


def test_one_table_instead_of_a_line_per_tensor(log):
    wrapper_of(TinyClassifier(), 'DefaultOptimWrapperConstructor', **RECIPE_OF_MMENGINE)
    assert len(log) == 6
    log.clear()
    wrapper_of(TinyClassifier(), **RECIPE)
    assert len(log) == 1


def test_other_lines_are_logged_again():
    """Only the constructor's own lines are silenced, and only while it runs."""
    logger = MMLogger.get_current_instance()
    before = list(logger.filters)
    wrapper_of(TinyClassifier(), **RECIPE)
    assert logger.filters == before
    with pytest.raises(ValueError):
        wrapper_of(nn.Linear(2, 2), **RECIPE)
    assert logger.filters == before


def test_steps_as_separate_groups_do():
    """Groups of many tensors train as groups of one, which MMEngine makes."""
    torch.manual_seed(0)
    models = [TinyClassifier(), TinyClassifier()]
    models[1].load_state_dict(models[0].state_dict())
    wrappers = [
        wrapper_of(models[0], norm_decay_mult=0.0, bias_lr_mult=2.0),
        wrapper_of(
            models[1],
            'DefaultOptimWrapperConstructor',
            norm_decay_mult=0.0,
            bias_lr_mult=2.0,
        ),
    ]
    assert len(wrappers[0].optimizer.param_groups) == 3
    assert len(wrappers[1].optimizer.param_groups) == len(list(models[1].parameters()))
    for _ in range(3):
        batch = torch.randn(4, 3, 8, 8), torch.arange(4)
        for model, wrapper in zip(models, wrappers):
            wrapper.update_params(model(*batch, mode='loss')['loss'])
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(a, b), name


def test_schedulers_keep_the_ratio():
    from mmengine.registry import PARAM_SCHEDULERS

    model = TinyClassifier()
    wrapper = wrapper_of(model, **RECIPE)
    scheduler = PARAM_SCHEDULERS.build(
        dict(type='CosineAnnealingLR', T_max=4, by_epoch=False),
        default_args=dict(optimizer=wrapper),
    )
    seen = []
    for _ in range(4):
        rates = settings_by_name(model, wrapper)
        seen.append(rates['head.weight'][0])
        assert rates['head.bias'][0] == pytest.approx(2 * seen[-1])
        assert rates['conv1.norm.bias'][0] == pytest.approx(2 * seen[-1])
        wrapper.optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert settings_by_name(model, wrapper)['head.bias'][0] == pytest.approx(0)
