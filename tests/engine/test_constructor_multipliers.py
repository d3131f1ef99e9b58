"""What the multipliers reach, parameter by parameter, and what they leave."""

from pathlib import Path

import pytest
from helpers import import_models, settings_by_name
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa.layers import OREPAConv2d

CONFIGS = Path(__file__).parents[2] / 'configs' / 'imagenet'
RECIPE = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, bias_lr_mult=2.0)


def settings(model, **paramwise):
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
            constructor='OREPAOptimWrapperConstructor',
            paramwise_cfg=paramwise,
        ),
    )
    return settings_by_name(model, wrapper)


def classifier(name, **backbone):
    import_models('mmpretrain')
    cfg = Config.fromfile(CONFIGS / f'{name}_4xb64_in1k.py').model
    cfg.backbone.update(base_channels=4, **backbone)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(cfg)


def stock():
    """A network of mmdet alone, of OREPA convs."""
    import_models('mmdet')
    cfg = dict(
        type='mmdet.ResNet',
        depth=50,
        base_channels=4,
        stem_channels=4,
        frozen_stages=-1,
        conv_cfg=dict(type='OREPAConv2d'),
        norm_cfg=dict(type='BN', requires_grad=True),
    )
    return nn.ModuleDict(dict(backbone=MODELS.build(cfg)))


NETWORKS = {
    'resnet50': lambda: classifier('resnet50-orepa'),
    'repvgg': lambda: classifier('repvgg-a0-orepa'),
    'stock': stock,
}
# What the names say about a parameter; the stem of RepVGG is not deep linear.
STEMS = {
    'resnet50': 'backbone.stem.',
    'repvgg': (),
    'stock': ('backbone.conv1.', 'backbone.bn1.'),
}
STEM_KEYS = {'stock': dict(stem_keys=['backbone.conv1', 'backbone.bn1'])}


def kinds(kind, model):
    """The names that each multiplier is meant for, from names and types alone."""
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    names = [name for name, _ in model.named_parameters()]
    of_norms = {n for n in names if n.rpartition('.')[0] in norms}
    return dict(
        norm_bias_lr_mult={n for n in of_norms if n.endswith('.bias')},
        stem_lr_mult={n for n in names if n.startswith(STEMS[kind])},
        scale_lr_mult={n for n in names if n.endswith('.scale')},
        scale_decay_mult={n for n in names if n.endswith('.scale')},
        branch_decay_mult={n for n in names if '.branches.' in n} - of_norms,
    )


@pytest.fixture(scope='module')
def built():
    """Models by kind; optimizers leave them alone."""
    models = {}

    def build(kind):
        if kind not in models:
            models[kind] = NETWORKS[kind]()
        return models[kind]

    return build


def multiplied(before, names, mult, setting):
    return {
        name: ((lr * mult, decay) if setting == 'lr' else (lr, decay * mult))
        if name in names
        else (lr, decay)
        for name, (lr, decay) in before.items()
    }


def approximately(expected):
    return {name: pytest.approx(values, rel=1e-9) for name, values in expected.items()}


OTHERS = {
    'no others': dict(),
    'recipe': RECIPE,
    'custom keys': dict(
        norm_decay_mult=0.0,
        bias_lr_mult=2.0,
        custom_keys={
            'layer1': dict(lr_mult=0.5, decay_mult=3.0),
            'stem': dict(lr_mult=0.25),
            'conv1': dict(decay_mult=0.7),
        },
    ),
    'flat and depthwise': dict(flat_decay_mult=0.4, dwconv_decay_mult=0.3),
}
MULTIPLIERS = {
    'norm_bias_lr_mult': 3.0,
    'stem_lr_mult': 0.1,
    'scale_lr_mult': 5.0,
    'scale_decay_mult': 0.2,
    'branch_decay_mult': 0.0,
}


@pytest.mark.parametrize(
    ('kind', 'others'),
    [
        *(('resnet50', others) for others in OTHERS),
        *((kind, 'custom keys') for kind in ('repvgg', 'stock')),
    ],
)
@pytest.mark.parametrize('option', MULTIPLIERS)
def test_multiplies_what_others_give(built, kind, option, others):
    model = built(kind)
    names = kinds(kind, model)[option]
    options = OTHERS[others]
    keys = STEM_KEYS.get(kind, {}) if option == 'stem_lr_mult' else {}
    mult = MULTIPLIERS[option]
    assert bool(names) == (option != 'stem_lr_mult' or bool(STEMS[kind]))
    before = settings(model, **options)
    assert before.keys() == dict(model.named_parameters()).keys()
    found = settings(model, **options, **keys, **{option: mult})
    setting = 'lr' if '_lr_' in option else 'decay'
    assert found == approximately(multiplied(before, names, mult, setting))
    assert (found != before) == bool(names)


@pytest.mark.parametrize('kind', NETWORKS)
def test_all_at_once(built, kind):
    """Where several are meant for one parameter, they multiply each other."""
    model = built(kind)
    by_option = kinds(kind, model)
    expected = settings(model, **RECIPE)
    for option, mult in MULTIPLIERS.items():
        setting = 'lr' if '_lr_' in option else 'decay'
        expected = multiplied(expected, by_option[option], mult, setting)
    found = settings(model, **RECIPE, **MULTIPLIERS, **STEM_KEYS.get(kind, {}))
    assert found == approximately(expected)


def test_stem_that_is_named(built):
    """Any modules can be the stem, of our networks too."""
    model = built('resnet50')
    keys = ['backbone.stem.branches', 'backbone.layer1.0', 'head.fc']
    found = settings(model, stem_lr_mult=0.1, stem_keys=keys)
    slow = {name for name, (lr, _) in found.items() if lr == pytest.approx(0.01)}
    prefixes = tuple(f'{key}.' for key in keys)
    assert slow == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


class TestErrors:
    @pytest.mark.parametrize('option', MULTIPLIERS)
    def test_nothing_that_fits(self, option):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
        with pytest.raises(ValueError, match=f'{option}=2.0 has no effect'):
            settings(model, **{option: 2.0})

    @pytest.mark.parametrize(
        ('option', 'frozen'),
        [('stem_lr_mult', 0), ('scale_lr_mult', 4), ('norm_bias_lr_mult', 4)],
    )
    def test_only_frozen_parameters(self, option, frozen):
        model = classifier('resnet18-orepa', frozen_stages=frozen)
        with pytest.raises(ValueError, match=f'{option}=2.0 .*frozen'):
            settings(model, **{option: 2.0})

    @pytest.mark.parametrize('block', ['plain', 'dbb'])
    def test_plain_stem_keeps_its_rate(self, block, log):
        """Or the first comparison, with another block, would be one of two rates."""
        model = classifier('resnet18-orepa', block=block)
        assert settings(model, stem_lr_mult=0.02) == settings(model)
        assert any('stem_lr_mult=0.02 is not applied' in line for line in log)
        named = settings(model, stem_lr_mult=0.02, stem_keys=['backbone.stem'])
        assert named != settings(model)

    def test_stem_of_other_networks_has_to_be_named(self, built):
        with pytest.raises(ValueError, match='stem_lr_mult=0.1 has no effect'):
            settings(built('stock'), stem_lr_mult=0.1)

    @pytest.mark.parametrize(
        ('options', 'words'),
        [
            (dict(stem_lr_mult=0.1, stem_keys=['backbone.conv9']), 'backbone.conv9'),
            (dict(stem_lr_mul=0.1), 'stem_lr_mul'),
        ],
    )
    def test_options(self, built, options, words):
        with pytest.raises(ValueError, match=words):
            settings(built('resnet50'), **options)

    @pytest.mark.parametrize('option', ['scale_decay_mult', 'branch_decay_mult'])
    def test_decay_that_is_not_set(self, option):
        model = nn.Sequential(OREPAConv2d(4, 4, 3))
        with pytest.raises(ValueError, match=f"{option} needs 'weight_decay' in the"):
            build_optim_wrapper(
                model,
                dict(
                    optimizer=dict(type='SGD', lr=0.1),
                    constructor='OREPAOptimWrapperConstructor',
                    paramwise_cfg={option: 0.0},
                ),
            )
