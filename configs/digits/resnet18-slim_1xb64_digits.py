_base_ = [
    '../_base_/models/resnet18_slim.py',
    '../_base_/datasets/digits_bs64.py',
    '../_base_/schedules/digits_bs64_20e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(block='plain'))
default_hooks = dict(logger=dict(interval=10))
randomness = dict(seed=0)
