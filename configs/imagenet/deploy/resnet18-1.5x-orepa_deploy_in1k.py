_base_ = '../resnet18-1.5x-orepa_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
