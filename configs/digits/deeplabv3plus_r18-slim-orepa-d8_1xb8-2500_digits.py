_base_ = [
    '../cityscapes/deeplabv3plus_r50-orepa-d8_4xb2-40k_cityscapes-512x1024.py',
    '../_base_/datasets/digits_cityscapes.py',
]

model = dict(**_base_.digits_model)
# Dilations for maps of 12x18, which those for Cityscapes would reach out of.
model['decode_head'].update(c1_in_channels=16, c1_channels=16, dilations=(1, 2, 4, 6))
data_preparation = _base_.digits_preparation
train_dataloader = _base_.digits_train_dataloader
val_dataloader = _base_.digits_val_dataloader
test_dataloader = val_dataloader
optim_wrapper = _base_.digits_optim_wrapper
train_cfg = _base_.digits_train_cfg
param_scheduler = _base_.digits_param_scheduler
default_hooks = dict(checkpoint=dict(interval=2500))
randomness = dict(seed=0)
