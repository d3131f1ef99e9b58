_base_ = 'resnet101_4xb64_in1k.py'

model = dict(backbone=dict(block='orepa'))
