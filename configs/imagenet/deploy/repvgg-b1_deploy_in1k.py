_base_ = '../repvgg-b1_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
