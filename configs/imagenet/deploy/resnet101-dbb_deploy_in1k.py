_base_ = '../resnet101-dbb_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
