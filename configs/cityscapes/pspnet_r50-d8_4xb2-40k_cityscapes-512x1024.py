_base_ = [
    '../_base_/models/pspnet_r50-d8.py',
    '../_base_/datasets/cityscapes.py',
    '../_base_/schedules/cityscapes_40k.py',
    '../_base_/seg_runtime.py',
]

pretrained = 'checkpoints/resnet50_4xb64_in1k.pth'

model = dict(backbone=dict(block='plain', init_cfg=dict(checkpoint=pretrained)))
