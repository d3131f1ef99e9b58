# From the plain ResNet-50 of torchvision: no pretraining of OREPA is needed.
_base_ = 'faster-rcnn_r50-orepa_fpn_1x_coco.py'

pretrained = 'torchvision://resnet50'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrained)))
