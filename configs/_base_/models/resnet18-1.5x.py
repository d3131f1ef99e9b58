_base_ = 'resnet18.py'

model = dict(backbone=dict(width_mult=1.5), head=dict(in_channels=768))
