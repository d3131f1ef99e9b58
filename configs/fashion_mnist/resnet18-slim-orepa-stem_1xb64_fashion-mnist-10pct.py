# Plain, with an OREPA stem.
_base_ = 'resnet18-slim_1xb64_fashion-mnist-10pct.py'

model = dict(backbone=dict(stem_block='orepa'))
