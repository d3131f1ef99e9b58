_base_ = '../repvgg-a0-orepa_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
