import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from scenes import CONFIGS, NAMES, batch, build, load, number_of_classes, shrink

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
