# The recipe of the paper's ImageNet tables: 4 GPUs of 64 images, 120 epochs.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
    constructor='OREPAOptimWrapperConstructor',
    # No BatchNorm parameter and no bias decays, and every bias, BatchNorm's
    # included, learns at twice the rate. The scaling vectors decay.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        bias_lr_mult=2.0,
        norm_bias_lr_mult=2.0,
    ),
)

param_scheduler = [
    # The published code warms up for 5 iterations, not epochs.
    dict(type='LinearLR', start_factor=0.2, by_epoch=False, begin=0, end=5),
    # To zero, stepped every iteration.
    dict(
        type='CosineAnnealingLR',
        T_max=120,
        eta_min=0.0,
        by_epoch=True,
        begin=0,
        end=120,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=120, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=256)
