_base_ = 'resnet18.py'

model = dict(backbone=dict(depth=101), head=dict(in_channels=2048))
