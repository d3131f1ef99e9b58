_base_ = '../repvgg-a1-orepa_4xb64_in1k.py'

model = dict(backbone=dict(deploy=True))
