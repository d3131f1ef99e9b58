_base_ = 'resnet18-1.5x_4xb64_in1k.py'

model = dict(backbone=dict(block='orepa'))
