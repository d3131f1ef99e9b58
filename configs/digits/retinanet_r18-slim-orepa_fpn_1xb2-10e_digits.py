_base_ = [
    '../_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/digits_coco.py',
    '../_base_/schedules/digits_coco_10e.py',
    '../_base_/det_runtime.py',
]

model = dict(
    **_base_.digits_model,
    # Half of the convs, of a quarter of the width.
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=2, num_classes=10),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
randomness = dict(seed=0)
