# The recipe of imagenet_bs256_120e.py, cut down to twenty short epochs.
_base_ = 'imagenet_bs256_120e.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=0.2, by_epoch=False, begin=0, end=5),
    dict(
        type='CosineAnnealingLR',
        T_max=20,
        eta_min=0.0,
        by_epoch=True,
        begin=0,
        end=20,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
auto_scale_lr = dict(base_batch_size=64)
