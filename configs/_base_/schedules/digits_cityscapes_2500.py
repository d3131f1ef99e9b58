# cityscapes_40k.py, for a few hundred small images on one CPU.
_base_ = 'cityscapes_40k.py'

# Eight images of few pixels, a head a quarter as wide: larger steps than for a city.
# docs/transfer.md says where the stem's multiplier comes from.
optim_wrapper = dict(optimizer=dict(lr=0.1), paramwise_cfg=dict(stem_lr_mult=0.5))
train_cfg = dict(max_iters=2500, val_interval=2500)
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=2500, by_epoch=False)
]
