_base_ = 'resnet18_4xb64_in1k.py'

model = dict(backbone=dict(depth=101), head=dict(in_channels=2048))
