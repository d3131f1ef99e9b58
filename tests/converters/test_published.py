import math
import re
from pathlib import Path

import pytest
import torch
from golden_networks import (
    NAMES,
    golden_input,
    golden_outputs,
    golden_shapes,
    golden_state,
)
from helpers import assert_near, deployed_twin
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from published_forward import PublishedNetwork
from published_layout import (
    FIXED,
    NORM,
    REPVGGS,
    RESNETS,
    assert_same_bits,
    cheap_state,
    fixed_entry,
    network,
    repvgg,
    resnet,
    trained_state,
)

from mmorepa.converters import from_published
from mmorepa.utils.errors import CheckpointError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'imagenet'
SPECIFIED = [
    *((name, block) for name in RESNETS for block in ('plain', 'dbb', 'orepa')),
    *((name, block) for name in REPVGGS for block in ('repvgg', 'orepa')),
]
LARGE = 90e6  # entries; from there on, conversions take seconds


def config_of(name, block):
    """The config of a published network, or None."""
    stem = name.lower().replace('resnet-', 'resnet').replace('resnext-', 'resnext')
    stem = stem.replace('resnext50', 'resnext50-32x4d')
    suffix = '' if block in ('plain', 'repvgg') else f'-{block}'
    path = CONFIGS / f'{stem}{suffix}_4xb64_in1k.py'
    return path if path.is_file() else None


def backbone_of(name, block):
    """The config of the backbone, without what has its default."""
    if name in REPVGGS:
        return dict(type='OREPARepVGG', arch=name.removeprefix('RepVGG-'), block=block)
    depth = int(re.search(r'\d+', name)[0])
    _, _, *widths = RESNETS[name]
    options = zip(('base_channels', 'groups', 'width_per_group'), widths, (64, 1, 64))
    changed = {option: value for option, value, default in options if value != default}
    return dict(type='OREPAResNet', depth=depth, block=block, **changed)


def cases():
    """Every network in both forms; the large ones are slow."""
    for name, block in SPECIFIED:
        for deployed in (False, True):
            entries = sum(map(math.prod, network(name, block, deployed).values()))
            yield pytest.param(
                name,
                block,
                deployed,
                marks=[pytest.mark.slow] if entries > LARGE else [],
                id=f'{name}-{block}-{"deployed" if deployed else "training"}',
            )


def names(pairs):
    return [f'{name}-{block}' for name, block in pairs]


def test_every_imagenet_config_is_a_published_network():
    found = {config_of(name, block) for name, block in SPECIFIED} - {None}
    # The publication has no network with the stem alone.
    stems = set(CONFIGS.glob('*-orepa-stem_*.py'))
    assert found == set(CONFIGS.glob('*.py')) - stems


@pytest.mark.parametrize('golden', NAMES)
def test_layout_and_formulas_of_these_tests(golden):
    """What the others are held against is itself that of the published code."""
    name = 'ResNet-18' if golden.startswith('resnet') else 'RepVGG-A0'
    assert golden_shapes(golden) == network(name, 'orepa')
    assert golden_shapes(golden, 'deployed') == network(name, 'orepa', deployed=True)
    state = golden_state(golden)
    for key in filter(lambda key: key.endswith(FIXED), state):
        assert_near(fixed_entry(key, state[key].shape), state[key], 1e-6)
    outputs = PublishedNetwork(state)(golden_input())
    assert_near(outputs, golden_outputs(golden), 1e-4)


@pytest.mark.parametrize(('name', 'block', 'deployed'), list(cases()))
def test_every_network(name, block, deployed):
    published = cheap_state(
        network(name, block, deployed), prefix='' if deployed else 'module.'
    )
    result = from_published(published)
    meta = result['meta']
    expected = block if not (deployed and block == 'repvgg') else 'orepa'
    assert meta['backbone'] == backbone_of(name, expected)
    assert meta['deployed'] is deployed

    config = config_of(name, block)
    if config is not None:
        load_strictly(config, deployed, result['state_dict'])


def load_strictly(config, deployed, state_dict):
    """Loads into the classifier of a config, without memory for its own weights."""
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.deploy = deployed
    with torch.device('meta'):
        classifier = MODELS.build(cfg.model)
    classifier.load_state_dict(state_dict, strict=True, assign=True)
    assert_same_bits(dict(classifier.state_dict()), state_dict)


# Networks of the same kinds, small enough for loops.
SMALL = {
    'basic': resnet,
    'bottleneck': resnet,
    'grouped': resnet,
    'many groups': resnet,
    'vgg': repvgg,
    'grouped vgg': repvgg,
    'squeezed vgg': repvgg,
}
SHAPES = {
    'basic': ((2, 2, 2, 2), False, 4, 1, 64),
    'bottleneck': ((3, 4, 6, 3), True, 4, 1, 64),
    # As in all of the published code, up to four groups and more differ.
    'grouped': ((3, 4, 6, 3), True, 4, 4, 32),
    'many groups': ((3, 4, 6, 3), True, 4, 8, 32),
    'vgg': ((2, 2, 2, 1), (4, 4, 8, 12, 20), 1, False),
    'grouped vgg': ((2, 2, 2, 1), (8, 8, 16, 24, 32), 4, False),
    'squeezed vgg': ((2, 2, 1, 1), (16, 16, 32, 32, 48), 2, True),
}
BLOCKS = {resnet: ('plain', 'dbb', 'orepa'), repvgg: ('repvgg', 'orepa')}
FUNCTIONS = [(name, block) for name, build in SMALL.items() for block in BLOCKS[build]]


def small_state(name, block, deployed=False, prefix='module.'):
    shapes = SMALL[name](*SHAPES[name], block, deployed=deployed, classes=7)
    return trained_state(shapes, prefix)


def small_backbone(name, block):
    if SMALL[name] is resnet:
        depths, _, width, groups, group_width = SHAPES[name]
        return dict(
            type='OREPAResNet',
            depth=18 if name == 'basic' else 50,
            base_channels=width,
            groups=groups,
            width_per_group=group_width,
            block=block,
        )
    depths, widths, groups, use_se = SHAPES[name]
    multipliers = [widths[i + 1] / (64 * 2**i) for i in range(4)]
    arch = dict(num_blocks=depths, widths=multipliers, groups=groups, use_se=use_se)
    return dict(type='OREPARepVGG', arch=arch, block=block)


@torch.no_grad()
def our_outputs(backbone, state_dict, images, deploy=False):
    """The four stages and the logits of a network that is loaded strictly."""
    net = MODELS.build(dict(backbone, deploy=deploy)).eval()
    own = {
        key.removeprefix('backbone.'): value
        for key, value in state_dict.items()
        if key.startswith('backbone.')
    }
    net.load_state_dict(own, strict=True)
    forms = [net] if deploy else [net, deployed_twin(net)]
    for form in forms:
        outputs = form(images)
        pooled = outputs[-1].mean(dim=(2, 3))
        logits = pooled @ state_dict['head.fc.weight'].T + state_dict['head.fc.bias']
        yield [*outputs, logits]


@pytest.mark.parametrize(('name', 'block'), FUNCTIONS, ids=names(FUNCTIONS))
def test_function_is_kept(name, block):
    """Both forms of ours against the published state, by the formulas."""
    published = small_state(name, block)
    result = from_published(published)
    backbone = result['meta']['backbone']
    told = from_published(published, small_backbone(name, block))
    assert_same_bits(told['state_dict'], result['state_dict'])
    assert backbone['block'] == block

    # Odd sizes, so that strides and borders do not fall together.
    images = torch.randn(2, 3, 70, 66)
    bare = {key.removeprefix('module.'): value for key, value in published.items()}
    expected = PublishedNetwork(bare)(images)
    forms = list(our_outputs(backbone, result['state_dict'], images))
    assert len(forms) == 2
    for form in forms:
        assert_near(form, expected, 1e-4)


@pytest.mark.parametrize(('name', 'block'), FUNCTIONS, ids=names(FUNCTIONS))
def test_function_of_a_deployed_state_is_kept(name, block):
    published = small_state(name, block, deployed=True, prefix='')
    result = from_published(published)
    images = torch.randn(2, 3, 70, 66)
    (outputs,) = our_outputs(
        result['meta']['backbone'], result['state_dict'], images, deploy=True
    )
    assert_near(outputs, PublishedNetwork(published)(images), 1e-4)


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_prefix_and_no_classifier(prefix):
    published = small_state('basic', 'orepa', prefix=prefix)
    published = {k: v for k, v in published.items() if 'linear.' not in k}
    result = from_published(published)
    assert all(k.startswith('backbone.') for k in result['state_dict'])


@pytest.mark.parametrize('spelling', ['l2i_conv', 'weight_l2i_conv'])
def test_spellings_of_the_pointwise_conv(spelling):
    published = small_state('bottleneck', 'orepa')
    theirs = {
        key.replace('weight_or1x1_l2i_conv', spelling): value
        for key, value in published.items()
    }
    result = from_published(theirs)
    assert_same_bits(result['state_dict'], from_published(published)['state_dict'])


@pytest.mark.parametrize('with_identity', [False, True])
def test_spellings_of_dbb(with_identity):
    published = small_state('basic', 'dbb')
    theirs = {
        key.replace('idconv1.conv.weight', 'idconv1.weight'): value
        for key, value in published.items()
    }
    if with_identity:
        for key in list(theirs):
            if key.endswith('.idconv1.weight'):
                eye = torch.eye(len(theirs[key]))[:, :, None, None]
                theirs[key.replace('.weight', '.id_tensor')] = eye
    result = from_published(theirs)
    assert_same_bits(result['state_dict'], from_published(published)['state_dict'])


@pytest.mark.parametrize(
    ('name', 'dtype'), [('basic', torch.float16), ('vgg', torch.float64)]
)
def test_other_precisions(name, dtype):
    """As after ``model.half()``, which converts fixed entries as well."""
    published = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in small_state(name, 'orepa').items()
    }
    result = from_published(published)
    kinds = {v.dtype for v in result['state_dict'].values()}
    assert kinds == {dtype, torch.int64}


class TestErrors:
    @pytest.fixture
    def published(self):
        return small_state('vgg', 'orepa', prefix='')

    def test_names_every_key(self, published):
        for key in list(published):
            if key.startswith('stage3.0.rbr_1x1.') or key == 'linear.bias':
                del published[key]
        missing = [f'layer3.0.conv.branches.pointwise.norm.{name}' for name in NORM]
        missing += ['layer3.0.conv.branches.pointwise.branches.weight', 'head.fc.bias']
        extra = [f'stage9.{i}.weight' for i in range(7)]
        published |= {key: torch.zeros(1) for key in extra}
        misshapen = ['stage1.0.rbr_dense.vector', 'stage2.1.rbr_identity.bias']
        for key in misshapen:
            published[key] = torch.zeros(3)
        wrong = ['stage2.0.rbr_dense.weight_rbr_prior', 'stage1.1.rbr_dense.id_tensor']
        for key in wrong:
            published[key] += 0.01
        with pytest.raises(CheckpointError) as caught:
            from_published(published)
        parts = str(caught.value).split('; ')
        words = ('missing', 'left over', 'of another shape', 'other values')
        for part, word, keys in zip(parts, words, (missing, extra, misshapen, wrong)):
            assert word in part and all(key in part for key in keys)

    @pytest.mark.parametrize(
        ('key', 'shape', 'named'),
        [
            ('linear.weight', (7, 21), r'\(7, 21\), not \(7, 20\)'),
            ('stage0.rbr_dense.vector', (), r'\(\), not \(5, 4\)'),
            ('stage1.1.rbr_dense.vector', (7, 4), r'\(7, 4\), not \(5, 4\)'),
        ],
    )
    def test_shapes(self, published, key, shape, named):
        published[key] = torch.zeros(shape)
        with pytest.raises(CheckpointError, match=named):
            from_published(published)

    def test_both_spellings_of_one_entry(self):
        published = small_state('bottleneck', 'orepa', prefix='')
        published['stage1.0.conv1.l2i_conv1'] = torch.zeros(4, 4, 1, 1)
        with pytest.raises(CheckpointError, match=r'left over.*conv1\.l2i_conv1'):
            from_published(published)

    @pytest.mark.parametrize(
        ('state', 'words'),
        [
            ({}, 'no keys stage1'),
            ({'conv1.weight': torch.zeros(1)}, 'no keys stage1.*conv1.weight'),
            (
                {f'stage{i}.0.conv1.bn.bias': torch.zeros(1) for i in range(1, 5)},
                r'no ResNet has stages of \(1, 1, 1, 1\) basic blocks',
            ),
            (
                {f'stage{i}.0.rbr_identity.bias': torch.zeros(1) for i in range(1, 5)},
                "no kernel under 'stage1.0'",
            ),
        ],
    )
    def test_no_published_network(self, state, words):
        with pytest.raises(CheckpointError, match=words):
            from_published(state)

    def test_blocks_without_a_published_layout(self):
        backbone = dict(type='OREPAResNet', depth=18, block='deep_linear')
        with pytest.raises(CheckpointError, match='missing: stem.branches.factors'):
            from_published(small_state('basic', 'plain'), backbone)
