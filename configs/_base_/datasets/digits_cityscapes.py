# Scenes of digits in Cityscapes' format, and what they change in a segmenter.
_base_ = 'cityscapes.py'

data_preparation = 'run: python tools/dataset_converters/digits.py --out data/digits'

# Background, ten digits. CityscapesDataset takes no names but its own, and so the
# first eleven of these stand for them: 'road' is background, 'sidewalk' digit 0, ….
_num_classes = 11
# Nine pixels of ten are background: unweighted, nothing else is learned at first.
_class_weight = [0.3] + [1.0] * 10
digits_model = dict(
    # The normalisation of the pretraining, which is that of single digits.
    data_preprocessor=dict(
        mean=[77.0, 77.0, 77.0], std=[95.0, 95.0, 95.0], size=(96, 144)
    ),
    backbone=dict(
        block='orepa',
        depth=18,
        base_channels=16,
        # Three stages: single digits of 32x32 are one pixel in the fourth, whose outer
        # taps the pretraining has therefore left as they were.
        num_stages=3,
        out_indices=(0, 1, 2),
        init_cfg=dict(checkpoint='work_dirs/quickstart/train/epoch_20.pth'),
    ),
    decode_head=dict(
        in_channels=64,
        in_index=2,
        channels=64,
        num_classes=_num_classes,
        loss_decode=dict(
            type='CrossEntropyLoss', loss_weight=1.0, class_weight=_class_weight
        ),
    ),
    auxiliary_head=dict(
        in_channels=32,
        in_index=1,
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
# Somewhat smaller, the digits are about as large as those of the pretraining. No image
# is smaller than a crop: the loss has no class weight for the label of padding.
_size = (168, 112)
_crop_size = (96, 144)
_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=_size, ratio_range=(0.86, 1.15), keep_ratio=True),
    dict(type='RandomCrop', crop_size=_crop_size),
    # That of Cityscapes but for the flip: a digit's mirror image is none.
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=_size, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(**_dataset, pipeline=_train_pipeline),
)
val_dataloader = dict(num_workers=1, dataset=dict(**_dataset, pipeline=_test_pipeline))
test_dataloader = val_dataloader
