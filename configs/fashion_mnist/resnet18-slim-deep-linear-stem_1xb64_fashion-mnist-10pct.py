# Plain, with a deep linear stem without branches.
_base_ = 'resnet18-slim_1xb64_fashion-mnist-10pct.py'

model = dict(backbone=dict(stem_block='deep_linear'))
