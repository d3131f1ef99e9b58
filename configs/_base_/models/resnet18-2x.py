_base_ = 'resnet18.py'

model = dict(backbone=dict(width_mult=2.0), head=dict(in_channels=1024))
