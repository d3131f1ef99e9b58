_base_ = 'retinanet_repvgg-a0_fpn.py'

model = dict(backbone=dict(arch='A2'), neck=dict(in_channels=[96, 192, 384, 1408]))
