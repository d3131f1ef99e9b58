"""OREPAConv2d by conv_cfg in the toolboxes' own detectors and segmenters."""

import copy

import torch
from helpers import assert_near, counted_folds, import_models
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from scenes import batch

import mmorepa
from mmorepa import is_switchable, switch_to_deploy
from mmorepa.analysis import raw_outputs
from mmorepa.layers import OREPAConv2d, ReparamConv2d

OREPA = dict(type='OREPAConv2d')
SGD = dict(optimizer=dict(type='SGD', lr=1e-4, momentum=0.9))


def retinanet():
    return dict(
        type='RetinaNet',
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[127.0] * 3, std=[60.0] * 3
        ),
        backbone=dict(
            type='ResNet', depth=18, base_channels=8, stem_channels=8, conv_cfg=OREPA
        ),
        neck=dict(
            type='FPN',
            in_channels=[8, 16, 32, 64],
            out_channels=16,
            start_level=1,
            add_extra_convs='on_input',
            num_outs=5,
            conv_cfg=OREPA,
        ),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=4,
            in_channels=16,
            feat_channels=16,
            stacked_convs=2,
            conv_cfg=OREPA,
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
            ),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
        ),
        test_cfg=dict(
            nms_pre=100,
            score_thr=0.05,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=10,
        ),
    )


def test_trains_and_deploys():
    import_models('mmdet')
    init_default_scope('mmdet')
    cfg = retinanet()
    model = MODELS.build(copy.deepcopy(cfg))
    model.init_weights()
    for part in (model.backbone, model.neck, model.bbox_head):
        assert any(isinstance(module, OREPAConv2d) for module in part.modules())
    wrapper = build_optim_wrapper(model, SGD)
    data = batch('mmdet', 4)
    before = {k: v.clone() for k, v in model.named_parameters()}
    for _ in range(2):
        losses = model.train().train_step(data, wrapper)
        assert all(torch.isfinite(v).all() for v in losses.values())
    moved = [k for k, v in model.named_parameters() if not torch.equal(v, before[k])]
    assert any('backbone.layer4' in key and 'branches' in key for key in moved)

    model.eval()
    expected = raw_outputs(model, data)
    switch_to_deploy(model)
    assert not is_switchable(model)
    assert_near(raw_outputs(model, data), expected, 1e-3)
    for part in ('backbone', 'neck', 'bbox_head'):
        cfg[part]['conv_cfg'] = dict(OREPA, deploy=True)
    plain = MODELS.build(cfg)
    plain.load_state_dict(model.state_dict())
    assert_near(raw_outputs(plain.eval(), data), raw_outputs(model, data), 1e-5)


def test_a_shared_head_folds_once():
    """Five levels, one fold of each conv, in training, with its gradient, and after."""
    import_models('mmdet')
    init_default_scope('mmdet')
    model = MODELS.build(retinanet())
    model.init_weights()
    wrapper = build_optim_wrapper(model, dict(SGD, type='FoldedOptimWrapper'))
    data = batch('mmdet', 4)
    convs = [m for m in model.modules() if isinstance(m, ReparamConv2d)]
    shared = model.bbox_head.cls_convs[0].conv
    assert shared in convs
    used = []
    shared.register_forward_hook(lambda *_: used.append(1))
    with counted_folds(shared) as folds:
        for step in range(1, 3):
            model.train()
            used.clear(), folds.clear()
            model.train_step(data, wrapper)
            assert (len(used), len(folds)) == (5, 1), step
        model.eval()
        used.clear(), folds.clear()
        with torch.no_grad(), mmorepa.folded(model):
            raw_outputs(model, data)
            raw_outputs(model, data)
        assert (len(used), len(folds)) == (10, 1)
