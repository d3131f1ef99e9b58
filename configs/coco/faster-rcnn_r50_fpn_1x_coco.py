_base_ = [
    '../_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/det_runtime.py',
]

pretrained = 'checkpoints/resnet50_4xb64_in1k.pth'

model = dict(backbone=dict(block='plain', init_cfg=dict(checkpoint=pretrained)))
