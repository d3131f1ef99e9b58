# Plain, with a deep linear stem without branches.
_base_ = 'resnet18-slim_1xb256_fashion-mnist.py'

model = dict(backbone=dict(stem_block='deep_linear'))
