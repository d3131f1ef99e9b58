# From the plain ResNet-50 of torchvision; only the stem has branches.
_base_ = 'retinanet_r50-orepa-from-plain_fpn_1x_coco.py'

model = dict(backbone=dict(block='plain', stem_block='orepa'))
