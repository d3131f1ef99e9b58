_base_ = [
    '../_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/det_runtime.py',
]

pretrained = 'checkpoints/resnet50-orepa_4xb64_in1k.pth'

model = dict(backbone=dict(block='orepa', init_cfg=dict(checkpoint=pretrained)))

# docs/transfer.md says where this number comes from.
optim_wrapper = dict(paramwise_cfg=dict(stem_lr_mult=0.5))
