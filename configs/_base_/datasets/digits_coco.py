# Scenes of digits in COCO's format, and what they change in a detector.
_base_ = 'coco_detection.py'

data_preparation = 'run: python tools/dataset_converters/digits.py --out data/digits'

digits_model = dict(
    # The normalisation of the pretraining, which is that of single digits.
    data_preprocessor=dict(mean=[77.0, 77.0, 77.0], std=[95.0, 95.0, 95.0]),
    backbone=dict(
        block='orepa',
        depth=18,
        base_channels=16,
        # Scenes look unlike the images of one digit each of the pretraining.
        norm_eval=False,
        init_cfg=dict(checkpoint='work_dirs/quickstart/train/epoch_20.pth'),
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64),
)

_dataset = dict(
    data_root='data/digits/coco/', metainfo=dict(classes=tuple('0123456789'))
)
_load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(192, 128), keep_ratio=True),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    # Without a flip: a digit's mirror image is none.
    dataset=dict(**_dataset, pipeline=[*_load, dict(type='PackDetInputs')]),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        **_dataset,
        pipeline=[
            *_load,
            dict(
                type='PackDetInputs',
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                ),
            ),
        ],
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(ann_file='data/digits/coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator
