# scikit-learn's 1,797 images of handwritten digits, 8x8 pixels.
data_preparation = 'run: python tools/dataset_converters/digits.py --out data/digits'
dataset_type = 'CustomDataset'
data_root = 'data/digits'
data_preprocessor = dict(
    num_classes=10,
    mean=[77.0, 77.0, 77.0],
    std=[95.0, 95.0, 95.0],
    to_rgb=True,
)

# The 7x7 stem and the pooling divide the size by four: enlarge the digits first.
enlarge = dict(type='Resize', scale=32, interpolation='bicubic')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    enlarge,
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), enlarge, dict(type='PackInputs')]

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix='train',
        pipeline=train_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix='val',
        pipeline=test_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
