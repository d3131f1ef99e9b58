# What the digits change in a COCO config; the configs take it from here by name.
digits_preparation = 'run: python tools/dataset_converters/digits.py --out data/digits'


digits_model = dict(
    # The normalisation of the pretraining, which is that of single digits.
    data_preprocessor=dict(mean=[77.0, 77.0, 77.0], std=[95.0, 95.0, 95.0]),
    backbone=dict(
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
digits_train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    # Without a flip: a digit's mirror image is none.
    dataset=dict(**_dataset, pipeline=[*_load, dict(type='PackDetInputs')]),
)
digits_val_dataloader = dict(
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
digits_evaluator = dict(ann_file='data/digits/coco/annotations/instances_val2017.json')

digits_train_cfg = dict(max_epochs=10, val_interval=10)
digits_param_scheduler = [
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
