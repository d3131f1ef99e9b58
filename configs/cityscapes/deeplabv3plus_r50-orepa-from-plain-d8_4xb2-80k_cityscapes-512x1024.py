# From the plain ResNet-50 of torchvision: no pretraining of OREPA is needed.
_base_ = 'deeplabv3plus_r50-orepa-d8_4xb2-80k_cityscapes-512x1024.py'

pretrained = 'torchvision://resnet50'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrained)))
