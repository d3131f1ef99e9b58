_base_ = 'resnet18_4xb64_in1k.py'

model = dict(backbone=dict(width_mult=2.0), head=dict(in_channels=1024))
