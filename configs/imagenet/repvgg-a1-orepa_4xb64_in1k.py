_base_ = 'repvgg-a1_4xb64_in1k.py'

model = dict(backbone=dict(block='orepa'))
