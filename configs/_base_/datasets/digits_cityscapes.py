# What the digits change in a Cityscapes config; the configs take it from here by name.
digits_preparation = 'run: python tools/dataset_converters/digits.py --out data/digits'

# Background, ten digits. CityscapesDataset takes no names but its own, and so the
# first eleven of these stand for them: 'road' is background, 'sidewalk' digit 0, ….
_num_classes = 11
# Nine pixels of ten are background: unweighted, nothing else is learned at first.
_class_weight = [0.2] + [1.0] * 10
digits_model = dict(
    # The normalisation of the pretraining, which is that of single digits.
    data_preprocessor=dict(
        mean=[77.0, 77.0, 77.0], std=[95.0, 95.0, 95.0], size=(128, 192)
    ),
    backbone=dict(
        depth=18,
        base_channels=16,
        init_cfg=dict(checkpoint='work_dirs/quickstart/train/epoch_20.pth'),
    ),
    decode_head=dict(
        in_channels=128,
        channels=64,
        num_classes=_num_classes,
        loss_decode=dict(
            type='CrossEntropyLoss', loss_weight=1.0, class_weight=_class_weight
        ),
    ),
    auxiliary_head=dict(
        in_channels=64,
        channels=32,
        num_classes=_num_classes,
        loss_decode=dict(class_weight=_class_weight),
    ),
)

_dataset = dict(
    data_root='data/digits/cityscapes/',
    metainfo=dict(
        classes=(
            'road',
            'sidewalk',
            'building',
            'wall',
            'fence',
            'pole',
            'traffic light',
            'traffic sign',
            'vegetation',
            'terrain',
            'sky',
        )
    ),
)
# Neither enlarged nor mirrored: a digit's mirror image is none.
_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
digits_train_dataloader = dict(
    batch_size=4, num_workers=1, dataset=dict(**_dataset, pipeline=_pipeline)
)
digits_val_dataloader = dict(
    num_workers=1, dataset=dict(**_dataset, pipeline=_pipeline)
)

# Four images of few pixels, a head a quarter as wide: larger steps than for a city.
digits_optim_wrapper = dict(optimizer=dict(lr=0.05))
digits_train_cfg = dict(max_iters=1200, val_interval=1200)
digits_param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=1200, by_epoch=False)
]
