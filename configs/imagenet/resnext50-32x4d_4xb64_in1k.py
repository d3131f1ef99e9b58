_base_ = 'resnet50_4xb64_in1k.py'

model = dict(backbone=dict(groups=32, width_per_group=4))
