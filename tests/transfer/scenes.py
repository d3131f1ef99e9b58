"""Detectors and segmenters, and batches for them, small enough for a test."""

import numpy as np
import torch
from helpers import import_models
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_runs import ROOT

from mmorepa import list_configs

CONFIGS = ROOT / 'configs'
NAMES = [
    name
    for name in map('{}.py'.format, list_configs())
    if Config.fromfile(CONFIGS / name).default_scope in ('mmdet', 'mmseg')
]
SIZE = 64


def load(name):
    """A config by its name under configs/, its classes registered."""
    cfg = Config.fromfile(CONFIGS / name)
    import_models(cfg.default_scope)
    init_default_scope(cfg.default_scope)
    return cfg


def shrink(cfg):
    """An eighth of the width, without pretrained weights."""
    model = cfg.model
    backbone = model.backbone
    before = backbone.get('base_channels', 64)
    backbone.base_channels = 8
    backbone.init_cfg = None

    def narrower(channels):
        return channels * 8 // before

    if cfg.default_scope == 'mmseg':
        head, auxiliary = model.decode_head, model.auxiliary_head
        head.update(in_channels=narrower(head.in_channels), channels=16)
        auxiliary.update(in_channels=narrower(auxiliary.in_channels), channels=8)
        if 'c1_in_channels' in head:
            head.update(c1_in_channels=narrower(head.c1_in_channels), c1_channels=8)
        model.data_preprocessor.size = (SIZE, SIZE)
        return cfg
    neck = model.neck
    neck.update(in_channels=[narrower(c) for c in neck.in_channels], out_channels=16)
    if 'rpn_head' in model:
        model.rpn_head.update(in_channels=16, feat_channels=16)
        model.roi_head.bbox_roi_extractor.out_channels = 16
        model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    else:
        model.bbox_head.update(in_channels=16, feat_channels=16)
    return cfg


def build(cfg):
    """The model, its weights initialised as by a runner."""
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def batch(scope, classes, images=2, seed=0):
    """A batch as the training dataloader of this toolbox yields it."""
    generator = np.random.default_rng(seed)
    make = _detection_sample if scope == 'mmdet' else _segmentation_sample
    pixels = [
        torch.from_numpy(generator.integers(256, size=(3, SIZE, SIZE), dtype=np.uint8))
        for _ in range(images)
    ]
    return dict(
        inputs=pixels, data_samples=[make(classes, generator) for _ in range(images)]
    )


_META = dict(
    img_shape=(SIZE, SIZE),
    ori_shape=(SIZE, SIZE),
    pad_shape=(SIZE, SIZE),
    scale_factor=(1.0, 1.0),
    img_id=0,
)


def _detection_sample(classes, generator):
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmengine.structures import InstanceData

    corners = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 16.0, 60.0, 58.0]])
    instances = InstanceData(
        bboxes=HorizontalBoxes(corners),
        labels=torch.from_numpy(generator.integers(classes, size=2)),
    )
    sample = DetDataSample(metainfo=_META)
    sample.gt_instances = instances
    sample.ignored_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0).long()
    )
    return sample


def _segmentation_sample(classes, generator):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_META)
    labels = torch.from_numpy(generator.integers(classes, size=(1, SIZE, SIZE)))
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def number_of_classes(cfg):
    """The classes that the head of a config tells apart."""
    model = cfg.model
    if cfg.default_scope == 'mmseg':
        return model.decode_head.num_classes
    head = model.roi_head.bbox_head if 'roi_head' in model else model.bbox_head
    return head.num_classes
