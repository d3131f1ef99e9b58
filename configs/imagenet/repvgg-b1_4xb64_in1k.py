_base_ = 'repvgg-a0_4xb64_in1k.py'

model = dict(backbone=dict(arch='B1'), head=dict(in_channels=2048))
