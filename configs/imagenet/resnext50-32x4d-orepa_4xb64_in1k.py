_base_ = 'resnext50-32x4d_4xb64_in1k.py'

model = dict(backbone=dict(block='orepa'))
