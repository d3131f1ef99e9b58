_base_ = '../repvgg-a2_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
