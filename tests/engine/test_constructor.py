import copy
from pathlib import Path

import pytest
import torch
from helpers import assert_near
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from runners import TinyClassifier
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa.backbones import OREPAResNet
from mmorepa.engine import OREPAOptimWrapperConstructor
from mmorepa.layers import DBBConv2d, OREPAConv2d, build_conv

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
    # A change of the default scope is logged too, after tests of other toolboxes.
    (text,) = [text for text in log if text.startswith('Parameter groups')]
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
    text, _ = log
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
    assert len(log) == 2  # The table, and how this trains.


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


@pytest.mark.parametrize(('norm_cfg', 'count'), [(None, 0), (dict(type='BN'), 1)])
def test_says_where_norms_follow_norms(log, norm_cfg, count):
    conv_cfg = dict(type='DBBConv2d')
    model = nn.Sequential(
        ConvModule(3, 4, 3, padding=1, conv_cfg=conv_cfg, norm_cfg=norm_cfg),
        # This one is the norm that the network has here.
        build_conv('dbb', 4, 4, 3, padding=1, bias=False, norm_cfg=dict(type='BN')),
    )
    wrapper_of(model)
    assert ('the norms of 1 are followed by another one' in log[-1]) is bool(count)
    assert model[0].conv.has_second_norm is bool(count)
    assert not model[1].has_second_norm


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
    # In loops of their own, which round differently on some processors.
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert_near(a, b)


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


def resnet(block='orepa', depth=18, **options):
    return nn.ModuleDict(
        dict(
            backbone=OREPAResNet(depth, block=block, base_channels=4, **options),
            head=nn.Linear(32, 2),
        )
    )


class TestMultipliers:
    """Each changes one setting of the parameters that it is for, and no other."""

    def changes(self, model, option, value=3.0, **others):
        """Factors by which ``option`` changes (learning rate, decay), by name."""
        others.setdefault('bias_lr_mult', 2.0)
        before = settings_by_name(model, wrapper_of(model, **others))
        after = settings_by_name(model, wrapper_of(model, **others, **{option: value}))
        return {
            name: tuple(a / b if b else a - b for a, b in zip(after[name], pair))
            for name, pair in before.items()
            if after[name] != pair
        }

    def test_stem(self):
        model = resnet()
        found = self.changes(model, 'stem_lr_mult', norm_bias_lr_mult=2.0)
        stem = [f'backbone.stem.{n}' for n, _ in model.backbone.stem.named_parameters()]
        assert set(found) == set(stem)
        assert {'backbone.stem.norm.weight', 'backbone.stem.norm.bias'} < set(stem)
        assert 'backbone.stem.branches.factors.2.scale' in stem
        assert all(pair == pytest.approx((3, 1)) for pair in found.values())

    def test_stem_that_is_named(self):
        model = Various()
        found = self.changes(model, 'stem_lr_mult', stem_keys=['conv', 'head'])
        wanted = {
            name
            for name, _ in model.named_parameters()
            if name.startswith(('conv.', 'head.'))
        }
        assert set(found) == wanted
        # Names are whole: 'conv' is not 'conv_offset'.
        with pytest.raises(ValueError, match='stem_keys names con, which is no module'):
            wrapper_of(model, stem_lr_mult=2.0, stem_keys=['con', 'head'])

    def test_scales(self):
        model = resnet(depth=50)
        scales = {n for n, _ in model.named_parameters() if n.endswith('.scale')}
        assert len(scales) > 50
        for option, factors in (
            ('scale_lr_mult', (3, 1)),
            ('scale_decay_mult', (1, 3)),
        ):
            found = self.changes(model, option)
            assert set(found) == scales
            assert all(pair == pytest.approx(factors) for pair in found.values())

    @pytest.mark.parametrize('block', ['plain', 'dbb', 'orepa', 'orepa_repvgg'])
    def test_branches(self, block):
        """All that is folded into a kernel decays with it; norms and biases do not."""
        model = resnet(block)
        found = self.changes(model, 'branch_decay_mult', 0.0)
        wanted = {
            name
            for name, param in model.named_parameters()
            if name.startswith('backbone.') and param.dim() > 1
        }
        assert set(found) == wanted
        norms = {name for name in dict(model.named_parameters()) if 'norm' in name}
        assert norms and not norms & wanted
        after = settings_by_name(model, wrapper_of(model, branch_decay_mult=0.0))
        assert {after[name] for name in wanted} == {(0.1, 0.0)}

    def test_together(self):
        model = resnet()
        found = settings_by_name(
            model,
            wrapper_of(
                model,
                custom_keys={'layer1': dict(lr_mult=0.5)},
                norm_bias_lr_mult=2.0,
                stem_lr_mult=0.1,
                scale_lr_mult=3.0,
                scale_decay_mult=0.0,
            ),
        )
        stem = 'backbone.stem.'
        assert found[stem + 'norm.bias'] == pytest.approx((0.1 * 2 * 0.1, 1e-4))
        scale = 'branches.factors.0.scale'
        assert found[stem + scale] == pytest.approx((0.1 * 0.1 * 3, 0))
        block = 'backbone.layer1.0.conv1.'
        assert found[block + 'branches.scale'] == pytest.approx((0.1 * 0.5 * 3, 0))
        assert found[block + 'norm.bias'] == pytest.approx((0.1 * 0.5 * 2, 1e-4))
        assert found['head.weight'] == (0.1, 1e-4)

    @pytest.mark.parametrize(
        'option, model',
        [
            ('stem_lr_mult', Various),
            ('scale_lr_mult', lambda: resnet('plain')),
            ('scale_decay_mult', lambda: resnet('dbb')),
            ('branch_decay_mult', lambda: nn.Conv2d(2, 2, 3)),
            ('branch_decay_mult', lambda: resnet('orepa', deploy=True)),
        ],
    )
    def test_fits_nothing(self, option, model):
        with pytest.raises(ValueError, match=f'{option}=2.0 has no effect: the model'):
            wrapper_of(model(), **{option: 2.0})

    def test_fits_what_is_frozen(self):
        """As in detectors, whose configs freeze the stem."""
        with pytest.raises(ValueError, match='stem_lr_mult=2.0 .* is frozen'):
            wrapper_of(resnet(frozen_stages=1), stem_lr_mult=2.0)

    @pytest.mark.parametrize('name', ['norm_bias_lr_mul', 'lr_mult', 'stem'])
    def test_unknown(self, name):
        with pytest.raises(ValueError, match=f'no option {name}; it knows .*stem_keys'):
            wrapper_of(Various(), **{name: 2.0})

    def test_optimizer_without_decay(self):
        with pytest.raises(ValueError, match="branch_decay_mult needs 'weight_decay'"):
            build_optim_wrapper(
                resnet(),
                dict(
                    optimizer=dict(type='SGD', lr=0.1),
                    constructor='OREPAOptimWrapperConstructor',
                    paramwise_cfg=dict(branch_decay_mult=0.0),
                ),
            )


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


def test_config_is_left_alone():
    config = dict(optimizer=dict(type='SGD', lr=0.1), type='OptimWrapper')
    before = copy.deepcopy(config)
    OREPAOptimWrapperConstructor(config)(nn.Sequential(OREPAConv2d(3, 4, 3)))
    assert (
        config['optimizer'] == before['optimizer'] and config['type'] == before['type']
    )


def test_wrapper_types():
    def build(**options):
        config = dict(
            optimizer=dict(type='SGD', lr=0.1),
            constructor='OREPAOptimWrapperConstructor',
            **options,
        )
        return build_optim_wrapper(nn.Sequential(OREPAConv2d(3, 4, 3)), config)

    with pytest.raises(KeyError, match='OptimWraper'):
        build(type='OptimWraper')
    with pytest.raises(ValueError, match='folded=False contradicts'):
        build(type='FoldedOptimWrapper', folded=False)


def test_fused_updates_are_the_same():
    models = [nn.Sequential(OREPAConv2d(3, 4, 3), nn.BatchNorm2d(4)).double()]
    models.append(copy.deepcopy(models[0]))
    wrappers = [
        build_optim_wrapper(
            model,
            dict(
                optimizer=dict(
                    type='SGD', lr=0.1, momentum=0.9, weight_decay=0.01, **options
                ),
                constructor='OREPAOptimWrapperConstructor',
                paramwise_cfg=dict(norm_decay_mult=0.0),
            ),
        )
        for model, options in zip(models, (dict(), dict(fused=False)))
    ]
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        for model, wrapper in zip(models, wrappers):
            wrapper.update_params(model(x).square().mean())
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert_near(one, other, 1e-13)
