# coco_1x.py, for a few hundred small images on one CPU.
_base_ = 'coco_1x.py'

# docs/transfer.md says where this number comes from.
optim_wrapper = dict(paramwise_cfg=dict(stem_lr_mult=0.5))
train_cfg = dict(max_epochs=10, val_interval=10)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=10,
        by_epoch=True,
        begin=0,
        end=10,
        convert_to_iter_based=True,
    ),
]
