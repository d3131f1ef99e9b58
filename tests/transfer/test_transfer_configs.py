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

FULL = [name for name in NAMES if not name.startswith(('digits', 'custom'))]
# Those to inherit from, for data of one's own, are not named after a data set.
NAMED = [name for name in NAMES if not name.startswith('custom')]
OREPA_RESNETS = [name for name in NAMES if re.search('r50-orepa|r18-slim-orepa', name)]


def test_there_are_configs():
    digits = [name for name in NAMES if name.startswith('digits')]
    assert (len(digits), len(FULL)) == (4, 14 + 20)


@pytest.mark.parametrize('name', NAMES)
def test_is_short(name):
    lines = (CONFIGS / name).read_text().splitlines()
    assert len(lines) <= (18 if name in FULL else 35)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_trains_tests_and_switches(name):
    cfg = shrink(load(name))
    model = build(cfg)
    before = {key: value.clone() for key, value in model.named_parameters()}
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = batch(cfg.default_scope, number_of_classes(cfg))
    losses = model.train().train_step(data, wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
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


@pytest.mark.parametrize('name', NAMED)
def test_names_tell_the_truth(name):
    cfg = Config.fromfile(CONFIGS / name)
    stem = Path(name).stem
    backbone = cfg.model.backbone
    kind = re.search('orepa|dbb', stem)
    if '-orepa-stem' in stem:
        assert backbone.stem_block == 'orepa'
        kind = None
    assert backbone.block == (kind[0] if kind else 'plain')
    heads = dict(
        faster='FasterRCNN', retinanet='RetinaNet', pspnet='PSP', deeplab='Separable'
    )
    expected = next(v for k, v in heads.items() if stem.startswith(k))
    assert expected in cfg.model.type + cfg.model.get('decode_head', {}).get('type', '')
    if 'repvgg' in stem:
        assert backbone.arch.lower() == re.search('repvgg-(a[02])', stem)[1]
    else:
        assert backbone.depth == int(re.search('_r([0-9]+)', stem)[1])
    if name in FULL:
        assert cfg.train_dataloader.batch_size == 2
        checkpoint = backbone.init_cfg.checkpoint
        assert ('from-plain' in stem) == ('://' in checkpoint)
        twin = Path(checkpoint).stem
        if 'from-plain' in stem:
            arch = backbone.get('arch', '').lower()
            twin = f'repvgg-{arch}-orepa' if arch else 'resnet50-orepa'
            twin += '-stem' if '-orepa-stem' in stem else ''
            assert (
                f'repvgg-{arch}_' in checkpoint.lower()
                if arch
                else (checkpoint == 'torchvision://resnet50')
            )
            twin += '_4xb64_in1k'
        assert (CONFIGS / 'imagenet' / f'{twin}.py').is_file()
        pretraining = Config.fromfile(CONFIGS / 'imagenet' / f'{twin}.py')
    else:
        pretraining = Config.fromfile(
            CONFIGS / 'digits/resnet18-slim-orepa_1xb64_digits.py'
        )
    if name.startswith('coco'):
        assert cfg.train_cfg.max_epochs == 12
    if name.startswith('cityscapes'):
        assert cfg.train_cfg.max_iters == int(re.search('([0-9]+)k', stem)[1]) * 1000
        assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
        assert cfg.default_hooks.checkpoint.interval == cfg.train_cfg.val_interval
        assert tuple(cfg.model.data_preprocessor.size) == (512, 1024)
    for key in ('depth', 'arch', 'block', 'base_channels'):
        assert backbone.get(key) == pretraining.model.backbone.get(key)
    # The images look as they did in the pretraining.
    ours, theirs = cfg.model.data_preprocessor, pretraining.data_preprocessor
    assert (ours.mean, ours.std, ours.bgr_to_rgb) == (
        theirs.mean,
        theirs.std,
        theirs.to_rgb,
    )
    assert backbone.frozen_stages == -1


def settings(cfg):
    """(learning rate, weight decay) by name, as the optimizer has them."""
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(param): name for name, param in model.named_parameters()}
    found = {}
    for group in wrapper.optimizer.param_groups:
        for param in group['params']:
            name = names.pop(id(param))
            found[name] = (group['lr'], group['weight_decay'])
    assert not names, 'left out, or frozen'
    return model, found


@pytest.mark.parametrize('name', NAMES)
def test_parameter_groups(name):
    """One by one: only the stem's learning rate differs, its BN's included."""
    cfg = shrink(load(name))
    model, found = settings(cfg)
    lr = cfg.optim_wrapper.optimizer.lr
    decay = cfg.optim_wrapper.optimizer.weight_decay
    assert lr == (0.01 if 'r50' not in name or 'faster' not in name else 0.02) or (
        name.startswith(('digits', 'custom'))
    )
    assert decay == (5e-4 if cfg.default_scope == 'mmseg' else 1e-4)
    multiplier = cfg.optim_wrapper.get('paramwise_cfg', {}).get('stem_lr_mult', 1)
    assert (multiplier != 1) == (name in OREPA_RESNETS)
    expected = {
        key: (lr * multiplier if key.startswith('backbone.stem.') else lr, decay)
        for key, _ in model.named_parameters()
    }
    assert found == expected
    # On parameters that surely have a role.
    if name in OREPA_RESNETS:
        for role in (
            'branches.factors.2.weight_origin',
            'branches.factors.0.scale',
            'norm.weight',
            'norm.bias',
        ):
            assert found[f'backbone.stem.{role}'] == (lr * multiplier, decay)
        conv = 'backbone.layer1.0.conv2'
        kernel = 'weight' if '-orepa-stem' in name else 'scale'
        for role in (f'branches.{kernel}', 'norm.weight', 'norm.bias'):
            assert found[f'{conv}.{role}'] == (lr, decay)
    assert any(isinstance(m, _BatchNorm) for m in model.modules())


@pytest.mark.parametrize('name', OREPA_RESNETS)
def test_rules_hold_for_the_stem_too(name):
    """As in the paper's recipe for ImageNet, together with the stem's multiplier."""
    cfg = shrink(load(name))
    multiplier = cfg.optim_wrapper.paramwise_cfg.stem_lr_mult
    cfg.optim_wrapper.paramwise_cfg.update(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        bias_lr_mult=2.0,
        norm_bias_lr_mult=2.0,
        scale_lr_mult=3.0,
        scale_decay_mult=0.5,
    )
    model, found = settings(cfg)
    lr = cfg.optim_wrapper.optimizer.lr
    decay = cfg.optim_wrapper.optimizer.weight_decay
    norms = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for key, value in found.items():
        owner, _, kind = key.rpartition('.')
        expected_lr, expected_decay = lr, decay
        if kind == 'bias':
            expected_lr, expected_decay = 2 * lr, 0.0
        elif owner in norms:
            expected_decay = 0.0
        elif key.startswith('backbone.') and kind == 'scale':
            expected_lr, expected_decay = 3 * lr, 0.5 * decay
        if key.startswith('backbone.stem.'):
            expected_lr *= multiplier
        assert value == pytest.approx((expected_lr, expected_decay)), key


@pytest.mark.parametrize('name', [n for n in FULL if 'from-plain' not in n])
def test_missing_weights_say_how_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(name)
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    with pytest.raises(CheckpointError) as caught:
        backbone.init_weights()
    text = str(caught.value)
    assert cfg.model.backbone.init_cfg.checkpoint in text
    for advice in ('-from-plain', 'configs/imagenet', 'published_to_mmorepa.py'):
        assert advice in text


def stock(scope, name):
    """The toolbox's own config, where it is installed with its configs."""
    folder = Path(mmengine.utils.get_installed_path(scope)) / '.mim' / 'configs'
    if not (folder / name).is_file():
        pytest.skip(f'{scope} was installed without its configs')
    return Config.fromfile(folder / name)


TWINS = [
    ('coco/faster-rcnn_r50_fpn_1x_coco.py', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco'),
    ('coco/retinanet_r50_fpn_1x_coco.py', 'retinanet/retinanet_r50_fpn_1x_coco'),
    *(
        (f'cityscapes/{head}_r50-d8_4xb2-{k}_cityscapes-512x1024.py', f'{head}/'
         f'{head}_r50-d8_4xb2-{k}_cityscapes-512x1024')
        for head in ('pspnet', 'deeplabv3plus')
        for k in ('40k', '80k')
    ),
]  # fmt: skip


def without(node, *values):
    """Plain dicts without what is the toolbox's own default."""
    if isinstance(node, dict):
        return {
            k: without(v, *values)
            for k, v in node.items()
            if v is not None and k not in ('backend_args', 'data_preprocessor')
        }
    if isinstance(node, (list, tuple)):
        return [without(v, *values) for v in node]
    return node


def described(model):
    """What a head was built from and how it is set up, losses included."""
    plain = (bool, int, float, str, tuple, list, type(None))
    found = {}
    for name, module in model.named_modules():
        if name.startswith('backbone'):
            continue
        found[name] = (
            type(module).__name__,
            {
                k: v
                for k, v in vars(module).items()
                if isinstance(v, plain) and k not in ('_init_cfg', 'init_cfg')
            },
        )
    return found


@pytest.mark.parametrize(('name', 'twin'), TWINS)
def test_plain_twins_are_the_stock_configs(name, twin):
    """But for the backbone, and for what is frozen."""
    cfg = load(name)
    theirs = stock(cfg.default_scope, f'{twin}.py')
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator', 'train_cfg'):
        assert without(cfg[key]) == without(theirs[key])
    assert cfg.optim_wrapper.optimizer == theirs.optim_wrapper.optimizer
    assert [dict(s) for s in cfg.param_scheduler] == [
        dict(s) for s in theirs.param_scheduler
    ]
    backbone = cfg.model.backbone
    for key in ('norm_eval', 'strides', 'dilations', 'contract_dilation', 'norm_cfg'):
        default = dict(norm_eval=False, norm_cfg=dict(type='BN', requires_grad=True))
        assert backbone.get(key, default.get(key)) == theirs.model.backbone.get(
            key, default.get(key)
        )
    for config in (cfg, theirs):
        config.model.pop('pretrained', None)
        config.model.backbone = dict(type='OREPAResNet', depth=18, base_channels=4)
    with torch.device('meta'):
        models = [MODELS.build(config.model) for config in (cfg, theirs)]
    assert described(models[0]) == described(models[1])
    for key in ('train_cfg', 'test_cfg'):
        ours, others = (model.get(key) for model in (cfg.model, theirs.model))
        assert_refines(ours, others)


def assert_refines(ours, theirs):
    """``ours`` leaves out what are defaults, and contradicts nothing."""
    for key, value in ours.items():
        if isinstance(value, dict):
            assert_refines(value, theirs[key])
        else:
            assert value == theirs[key], key
    # All defaults of MaxIoUAssigner and RandomSampler.
    defaults = dict(ignore_iof_thr=-1, neg_pos_ub=-1, match_low_quality=True)
    defaults.update(add_gt_as_proposals=True)
    for key in theirs.keys() - ours.keys():
        assert theirs[key] == defaults[key], key
