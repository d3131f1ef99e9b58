# For grey images of 28x28 pixels, which end as maps of 2x2.
_base_ = 'resnet18_slim.py'

model = dict(backbone=dict(in_channels=1, strides=(1, 1, 2, 2)))
