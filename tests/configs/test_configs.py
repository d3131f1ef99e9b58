import math
import re
from functools import partial
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from helpers import import_models
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope
from tool_runs import ROOT
from torch import nn

import mmorepa
from mmorepa.layers import ReparamConv2d

CONFIGS = ROOT / 'configs'
NAMES = [f'{name}.py' for name in mmorepa.list_configs()]
DEPLOYED = [name for name in NAMES if '/deploy/' in name]
# Those of detectors and segmenters are tested in tests/transfer, and those for data of
# one's own in tests/tools/test_own_data.py.
CLASSIFIERS = [
    name
    for name in NAMES
    if name not in DEPLOYED
    and not name.startswith('custom/')
    and Config.fromfile(CONFIGS / name).default_scope == 'mmpretrain'
]
# Others are as these are, with more blocks, wider, or for other data.
TRAINED = [
    name
    for name in CLASSIFIERS
    if not re.search('resnet(34|101)|18-[12]|repvgg-[ab][12]|1xb256', name)
]


def load(name):
    """A config by its name under configs/, its classes registered."""
    cfg = Config.fromfile(CONFIGS / name)
    import_models(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    return cfg


def test_deployed_configs():
    """Of every network with branches, and nothing is changed but the form."""
    expected = {}
    for name in NAMES:
        if not name.startswith('imagenet/') or name in DEPLOYED:
            continue
        cfg = Config.fromfile(CONFIGS / name)
        backbone = cfg.model.backbone
        if 'stem_block' in backbone or backbone.block != 'plain':
            cfg.model.backbone.deploy = True
            stem = Path(name).stem.replace('_4xb64_', '_deploy_')
            expected[f'imagenet/deploy/{stem}.py'] = cfg.to_dict()
    assert expected.keys() == set(DEPLOYED)
    for name, cfg in expected.items():
        assert Config.fromfile(CONFIGS / name).to_dict() == cfg


def shrink(cfg):
    """A quarter of the width, for the backbone of a classifier."""
    backbone, head = cfg.model.backbone, cfg.model.head
    before = backbone.get('base_channels', 64)
    backbone.base_channels = 16  # The least that ResNeXt's groups divide.
    head.in_channels = head.in_channels * 16 // before
    return cfg


def classification_batch(size, model):
    from mmpretrain.structures import DataSample

    channels = model.backbone.get('in_channels', 3)
    images = torch.randint(256, (2, channels, size, size), dtype=torch.uint8)
    labels = torch.randint(model.head.num_classes, (2,))
    samples = [DataSample().set_gt_label(label) for label in labels]
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize('name', sorted({*CLASSIFIERS} - {*TRAINED}))
def test_builds(name):
    with torch.device('meta'):
        model = MODELS.build(load(name).model)
    assert any(isinstance(module, ReparamConv2d) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAINED)
def test_trains_and_tests(name):
    cfg = load(name)
    shrink(cfg).model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model)
    assert any(isinstance(module, ReparamConv2d) for module in model.modules())
    model.init_weights()
    before = {key: value.clone() for key, value in model.named_parameters()}
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = classification_batch(32, cfg.model)
    losses = model.train().train_step(batch, wrapper)
    assert torch.isfinite(losses['loss'])
    still = [k for k, v in model.named_parameters() if torch.equal(v, before[k])]
    # 1x1 convs after dead units, say, may get no gradient from two images, but not
    # whole parts of the network.
    assert len(still) < 0.1 * len(before), still

    results = model.eval().test_step(batch)
    assert [len(r.pred_score) for r in results] == [cfg.model.head.num_classes] * 2
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.process(data_samples=results, data_batch=batch)
    metrics = evaluator.evaluate(2)
    assert 0 <= metrics['accuracy/top1'] <= 100


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_names_tell_the_truth(name):
    """The name of a file is all that many users read of it."""
    cfg = Config.fromfile(CONFIGS / name)
    network, batches, data = Path(name).stem.split('_')
    backbone = cfg.model.backbone
    stem = re.search('-(orepa|deep-linear)-stem', network)
    network = network.replace(stem[0], '') if stem else network
    assert backbone.get('stem_block') == (stem[1].replace('-', '_') if stem else None)
    parts = network.split('-')
    block = next((b for b in ('orepa', 'dbb') if b in parts), 'plain')
    if 'repvgg' in network:
        assert backbone.arch.lower() == parts[1]
        names = dict(orepa=('orepa', 'orepa_repvgg'), plain=('plain', 'repvgg'))
        assert backbone.block in names[block]
    else:
        assert backbone.block == block
        assert str(backbone.depth) in network
    gpus, images = map(int, re.fullmatch(r'(\d+)xb(\d+)', batches).groups())
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == gpus * images
    classes = 1000 if data == 'in1k' else 10
    assert cfg.model.head.num_classes == classes == cfg.data_preprocessor.num_classes
    assert ('slim' in network) == (backbone.get('base_channels', 64) < 64)


def normalise(cfg, packed):
    """A batch of one image as the network is given it."""
    cfg = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    return MODELS.build(cfg)(
        dict(inputs=packed['inputs'][None], data_samples=[packed['data_samples']])
    )['inputs']


@pytest.mark.parametrize('dataset, shape', [('imagenet', 224), ('digits', 32)])
def test_pipelines(tmp_path, dataset, shape):
    """From an image file to what the network is given."""
    cfg = load(next(name for name in CLASSIFIERS if name.startswith(dataset)))
    size = (8, 8) if dataset == 'digits' else (300, 400)
    image = np.random.default_rng(0).integers(256, size=(*size, 3)).astype(np.uint8)
    path = tmp_path / 'image.png'
    mmcv.imwrite(image, str(path))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        transforms = [TRANSFORMS.build(step) for step in loader.dataset.pipeline]
        packed = Compose(transforms)(dict(img_path=str(path), gt_label=3))
        assert packed['inputs'].shape == (3, shape, shape)
        assert packed['inputs'].dtype == torch.uint8
        assert packed['data_samples'].gt_label.tolist() == [3]
    normalised = normalise(cfg, packed)[0]
    mean, std = (
        torch.tensor(cfg.data_preprocessor[name])[:, None, None]
        for name in ('mean', 'std')
    )
    # The means are those of RGB, and OpenCV reads BGR.
    assert torch.allclose(normalised, (packed['inputs'].flip(0) - mean) / std)


def test_imagenet_is_evaluated_as_in_the_paper():
    """Short side 256, then the centre."""
    cfg = load(next(name for name in NAMES if name.startswith('imagenet')))
    steps = [TRANSFORMS.build(s) for s in cfg.test_dataloader.dataset.pipeline[1:3]]
    image = np.zeros((600, 300, 3), np.uint8)
    resized = steps[0](dict(img=image, img_shape=image.shape[:2]))
    assert resized['img'].shape[:2] == (512, 256)
    resized['img'][144:368, 16:240] = 1
    cropped = steps[1](resized)['img']
    assert cropped.shape[:2] == (224, 224) and (cropped == 1).all()


def test_learning_rates():
    """Five steps of warm-up times a cosine that ends, at zero, with the training."""
    cfg = Config.fromfile(CONFIGS / 'imagenet/resnet18-orepa_4xb64_in1k.py')
    epochs, length = cfg.train_cfg.max_epochs, 3
    assert epochs == 120  # As in the paper.
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    schedulers = []
    for scheduler in cfg.param_scheduler:
        kind = PARAM_SCHEDULERS.get(scheduler.pop('type'))
        if scheduler.pop('convert_to_iter_based', False):
            kind = partial(kind.build_iter_from_epoch, epoch_length=length)
        schedulers.append(kind(optimizer=wrapper.optimizer, **scheduler))
    for i in range(epochs * length):
        bias, weight = sorted({*wrapper.get_lr()['lr']}, reverse=True)
        warm = 0.1 * min(1, (i + 1) / 5)
        expected = warm * (1 + math.cos(math.pi * i / (epochs * length))) / 2
        assert weight == pytest.approx(expected, rel=1e-6)
        assert bias == pytest.approx(2 * expected, rel=1e-6)
        wrapper.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
