_base_ = 'repvgg-a0_4xb64_in1k.py'

model = dict(backbone=dict(arch='A2'), head=dict(in_channels=1408))
