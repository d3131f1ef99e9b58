# Images of your own, in one folder for each class: docs/own_data.md.
data_preparation = (
    'set data_root of the datasets of train_dataloader, val_dataloader and '
    'test_dataloader to a folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg'
)
# A file that inherits from this sets them at its top: mmorepa hands them on.
variables = dict(
    max_epochs={'train_cfg.max_epochs': 1},
    image_size={
        'train_dataloader.dataset.pipeline.1.scale': 1,
        'val_dataloader.dataset.pipeline.1.scale': 8 / 7,
        'val_dataloader.dataset.pipeline.2.crop_size': 1,
        'test_dataloader.dataset.pipeline.1.scale': 8 / 7,
        'test_dataloader.dataset.pipeline.2.crop_size': 1,
    },
)
# The normalisation of the plain networks to start from.
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='CustomDataset',
        data_root='data/custom',
        data_prefix='train',
        pipeline=train_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='CustomDataset',
        data_root='data/custom',
        data_prefix='val',
        pipeline=test_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
# There may be fewer than five classes.
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
