_base_ = [
    '../_base_/models/pspnet_r50-d8.py',
    '../_base_/datasets/digits_cityscapes.py',
    '../_base_/schedules/digits_cityscapes_2500.py',
    '../_base_/seg_runtime.py',
]

model = _base_.digits_model
default_hooks = dict(checkpoint=dict(interval=2500))
randomness = dict(seed=0)
