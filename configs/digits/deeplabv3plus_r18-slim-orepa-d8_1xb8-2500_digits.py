_base_ = [
    '../_base_/models/deeplabv3plus_r50-d8.py',
    '../_base_/datasets/digits_cityscapes.py',
    '../_base_/schedules/digits_cityscapes_2500.py',
    '../_base_/seg_runtime.py',
]

model = dict(**_base_.digits_model)
# Dilations for maps of 12x18, which those for Cityscapes would reach out of.
model['decode_head'].update(c1_in_channels=16, c1_channels=16, dilations=(1, 2, 4, 6))
default_hooks = dict(checkpoint=dict(interval=2500))
randomness = dict(seed=0)
