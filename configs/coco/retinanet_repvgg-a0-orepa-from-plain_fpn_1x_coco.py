# From the plain RepVGG-A0 of mmpretrain: no pretraining of OREPA is needed.
_base_ = 'retinanet_repvgg-a0-orepa_fpn_1x_coco.py'

folder = 'https://download.openmmlab.com/mmclassification/v0/repvgg/'
pretrained = folder + 'repvgg-A0_8xb32_in1k_20221213-60ae8e23.pth'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrained)))
