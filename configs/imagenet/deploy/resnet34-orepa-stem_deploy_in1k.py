_base_ = '../resnet34-orepa-stem_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
