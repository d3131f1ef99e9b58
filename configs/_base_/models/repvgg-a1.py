_base_ = 'repvgg-a0.py'

model = dict(backbone=dict(arch='A1'))
