# From the plain ResNet-50 of torchvision; only the stem has branches.
_base_ = 'pspnet_r50-orepa-from-plain-d8_4xb2-80k_cityscapes-512x1024.py'

model = dict(backbone=dict(block='plain', stem_block='orepa'))
