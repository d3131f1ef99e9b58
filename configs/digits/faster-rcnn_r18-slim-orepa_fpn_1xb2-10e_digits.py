_base_ = [
    '../coco/faster-rcnn_r50-orepa_fpn_1x_coco.py',
    '../_base_/datasets/digits_coco.py',
]

model = dict(
    **_base_.digits_model,
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=200),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
data_preparation = _base_.digits_preparation
train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.digits_evaluator
test_evaluator = val_evaluator
train_cfg = _base_.digits_train_cfg
param_scheduler = _base_.digits_param_scheduler
randomness = dict(seed=0)
