_base_ = '../resnet18-2x-orepa_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
