_base_ = '../resnet50-dbb_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
