# Batches and a learning rate four times as large. Eight epochs are 1,880 steps, as many
# as twenty epochs of a tenth of the data in batches of 64.
_base_ = 'fashion_mnist_bs64_20e.py'

optim_wrapper = dict(optimizer=dict(lr=0.2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.2, by_epoch=False, begin=0, end=5),
    dict(
        type='CosineAnnealingLR',
        T_max=8,
        eta_min=0.0,
        by_epoch=True,
        begin=0,
        end=8,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=8, val_interval=1)
auto_scale_lr = dict(base_batch_size=256)
