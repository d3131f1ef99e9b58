import re
from pathlib import Path

import mmengine
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from scenes import CONFIGS, NAMES, batch, build, load, number_of_classes, shrink
from torch.nn.modules.batchnorm import _BatchNorm

from mmorepa import is_switchable, switch_to_deploy
from mmorepa.utils.errors import CheckpointError

# Those to inherit from, for data of one's own, are not named after a data set.
NAMED = [name for name in NAMES if not name.startswith('custom')]
FULL = [name for name in NAMED if not name.startswith('digits')]
# Others have the model of one of these.
MODELS_OF = [name for name in NAMED if not re.search('from-plain|80k', name)]
OREPA_RESNET = 'coco/retinanet_r50-orepa_fpn_1x_coco.py'


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS_OF)
def test_trains_tests_and_switches(name):
    cfg = shrink(load(name))
    model = build(cfg)
    before = {key: value.clone() for key, value in model.named_parameters()}
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    reached = set()
    for key, parameter in model.named_parameters():
        parameter.register_hook(lambda _, key=key: reached.add(key))
    data = batch(cfg.default_scope, number_of_classes(cfg))
    losses = model.train().train_step(data, wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    # So that more than one process needs no find_unused_parameters.
    assert reached == before.keys()
    still = [k for k, v in model.named_parameters() if torch.equal(v, before[k])]
    # Few anchors match in so small an image: single convs may stay as they are.
    assert len(still) < 0.2 * len(before), still

    data = batch(cfg.default_scope, number_of_classes(cfg), images=1)
    model.eval()
    assert is_switchable(model)
    (result,) = model.test_step(data)
    switch_to_deploy(model)
    assert not is_switchable(model)
    (deployed,) = model.test_step(data)
    if cfg.default_scope == 'mmseg':
        a, b = (sample.seg_logits.data for sample in (result, deployed))
        assert a.shape[0] == number_of_classes(cfg)
        assert torch.allclose(a, b, atol=1e-4 * a.abs().max().item())
    else:
        assert 'bboxes' in deployed.pred_instances


@pytest.mark.parametrize('name', sorted({*NAMES} - {*MODELS_OF}))
def test_builds(name):
    with torch.device('meta'):
        assert is_switchable(MODELS.build(load(name).model))


@pytest.mark.parametrize('name', NAMED)
def test_names_tell_the_truth(name):
    """And images and backbone are as in the pretraining that the name implies."""
    cfg = Config.fromfile(CONFIGS / name)
    stem, backbone = Path(name).stem, cfg.model.backbone
    kind = re.search('(orepa|dbb)(?!-stem)', stem)
    assert backbone.get('stem_block') == ('orepa' if '-orepa-stem' in stem else None)
    assert backbone.block == (kind[0] if kind else 'plain')
    if 'repvgg' in stem:
        assert backbone.arch.lower() == re.search('repvgg-(a[02])', stem)[1]
    else:
        assert backbone.depth == int(re.search('_r([0-9]+)', stem)[1])
    twin = 'digits/resnet18-slim-orepa_1xb64_digits.py'
    if name in FULL:
        checkpoint = backbone.init_cfg.checkpoint
        assert ('from-plain' in stem) == ('://' in checkpoint)
        twin = f'imagenet/{Path(checkpoint).stem}.py'
        if 'from-plain' in stem:
            network = f'repvgg-{backbone.arch}' if 'repvgg' in stem else 'resnet50'
            assert network.lower() in checkpoint.lower()
            suffix = '-orepa-stem' if '-orepa-stem' in stem else '-orepa'
            twin = f'imagenet/{network.lower()}{suffix}_4xb64_in1k.py'
    if name.startswith('cityscapes'):
        assert cfg.train_cfg.max_iters == int(re.search('([0-9]+)k', stem)[1]) * 1000
        assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    pretraining = Config.fromfile(CONFIGS / twin)
    for key in ('depth', 'arch', 'block', 'stem_block', 'base_channels'):
        assert backbone.get(key) == pretraining.model.backbone.get(key)
    ours, theirs = cfg.model.data_preprocessor, pretraining.data_preprocessor
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)
    assert ours.bgr_to_rgb == theirs.to_rgb


def settings(cfg):
    """(learning rate, weight decay) by name, as the optimizer has them."""
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(param): name for name, param in model.named_parameters()}
    values = {
        names.pop(id(param)): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    assert not names, 'left out, or frozen'
    return model, values


def test_learning_rate_of_the_stem():
    """The only one that differs, its BN's included."""
    cfg = shrink(load(OREPA_RESNET))
    multiplier = cfg.optim_wrapper.paramwise_cfg.stem_lr_mult
    model, values = settings(cfg)
    optimizer = cfg.optim_wrapper.optimizer
    lr, decay = optimizer.lr, optimizer.weight_decay
    stem = {k for k in values if k.startswith('backbone.stem.')}
    assert {'backbone.stem.norm.bias', 'backbone.stem.branches.factors.0.scale'} < stem
    for key, value in values.items():
        assert value == (lr * multiplier if key in stem else lr, decay)


@pytest.mark.parametrize('name', NAMES)
def test_multiplier_is_for_chains(name):
    """Only the stem of a ResNet with OREPA is one."""
    cfg = Config.fromfile(CONFIGS / name)
    multiplier = cfg.optim_wrapper.get('paramwise_cfg', {}).get('stem_lr_mult', 1)
    backbone = cfg.model.backbone
    is_chain = 'orepa' in (backbone.block, backbone.get('stem_block'))
    assert (multiplier != 1) == (is_chain and backbone.type == 'OREPAResNet')


def test_rules_hold_for_the_stem_too():
    """As in the paper's recipe for ImageNet, together with the stem's multiplier."""
    cfg = shrink(load(OREPA_RESNET))
    cfg.optim_wrapper.paramwise_cfg.update(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        bias_lr_mult=2.0,
        norm_bias_lr_mult=2.0,
    )
    multiplier = cfg.optim_wrapper.paramwise_cfg.stem_lr_mult
    model, values = settings(cfg)
    optimizer = cfg.optim_wrapper.optimizer
    norms = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for key, value in values.items():
        owner, _, kind = key.rpartition('.')
        lr = optimizer.lr * (2 if kind == 'bias' else 1)
        if key.startswith('backbone.stem.'):
            lr *= multiplier
        decays = kind != 'bias' and owner not in norms
        assert value == pytest.approx((lr, decays * optimizer.weight_decay)), key


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(OREPA_RESNET)
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    with pytest.raises(CheckpointError) as caught:
        backbone.init_weights()
    text = str(caught.value)
    assert cfg.model.backbone.init_cfg.checkpoint in text
    assert '-from-plain' in text and 'python -m mmorepa convert' in text


TWINS = {
    'coco/faster-rcnn_r50_fpn_1x_coco.py': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'coco/retinanet_r50_fpn_1x_coco.py': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    **{
        f'cityscapes/{name}': f'{name.partition("_")[0]}/{name}'
        for head in ('pspnet', 'deeplabv3plus')
        for name in [f'{head}_r50-d8_4xb2-40k_cityscapes-512x1024.py']
    },
}


def stock(scope, name):
    """The toolbox's own config, where it is installed with its configs."""
    path = Path(mmengine.utils.get_installed_path(scope), '.mim', 'configs', name)
    if not path.is_file():
        pytest.skip(f'{scope} was installed without its configs')
    return Config.fromfile(path)


def stated(node):
    """Plain dicts, without what is None as if it were not there."""
    if isinstance(node, dict):
        ignored = ('backend_args', 'data_preprocessor')
        items = ((k, stated(v)) for k, v in node.items() if k not in ignored)
        return {k: v for k, v in items if v is not None}
    return [stated(v) for v in node] if isinstance(node, (list, tuple)) else node


def described(model):
    """What a head was built from and how it is set up, losses included."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {
        name: (
            type(module).__name__,
            {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, plain) and not key.endswith('init_cfg')
            },
        )
        for name, module in model.named_modules()
        if not name.startswith('backbone')
    }


@pytest.mark.parametrize('name', TWINS)
def test_plain_twins_are_the_stock_configs(name):
    """But for the backbone, and for what is frozen."""
    cfg = load(name)
    theirs = stock(cfg.default_scope, TWINS[name])
    for key in (
        *('train_dataloader', 'val_dataloader', 'val_evaluator', 'train_cfg'),
        'param_scheduler',
    ):
        assert stated(cfg[key]) == stated(theirs[key])
    assert cfg.optim_wrapper.optimizer == theirs.optim_wrapper.optimizer
    backbones = []
    for config in (cfg, theirs):
        config.model.pop('pretrained', None)
        backbones.append(config.model.backbone)
        config.model.backbone = dict(type='OREPAResNet', depth=18, base_channels=4)
    for key in ('norm_eval', 'strides', 'dilations', 'contract_dilation'):
        ours, others = (backbone.get(key) or None for backbone in backbones)
        assert ours == others, key
    with torch.device('meta'):
        models = [MODELS.build(config.model) for config in (cfg, theirs)]
    assert described(models[0]) == described(models[1])
    for key in ('train_cfg', 'test_cfg'):
        assert_refines(*(config.model.get(key) for config in (cfg, theirs)))


def assert_refines(ours, theirs):
    """``ours`` contradicts nothing."""
    for key, value in ours.items():
        if isinstance(value, dict):
            assert_refines(value, theirs[key])
        else:
            assert value == theirs[key], key
