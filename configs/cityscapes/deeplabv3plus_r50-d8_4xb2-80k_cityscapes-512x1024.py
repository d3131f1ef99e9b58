_base_ = [
    '../_base_/models/deeplabv3plus_r50-d8.py',
    '../_base_/datasets/cityscapes.py',
    '../_base_/schedules/cityscapes_80k.py',
    '../_base_/seg_runtime.py',
]

pretrained = 'checkpoints/resnet50_4xb64_in1k.pth'

model = dict(backbone=dict(block='plain', init_cfg=dict(checkpoint=pretrained)))

default_hooks = dict(checkpoint=dict(interval=8000))
