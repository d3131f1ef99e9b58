_base_ = [
    '../coco/retinanet_r50-orepa_fpn_1x_coco.py',
    '../_base_/datasets/digits_coco.py',
]

model = dict(
    **_base_.digits_model,
    # Half of the convs, of a quarter of the width.
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=2, num_classes=10),
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
