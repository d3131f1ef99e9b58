# Images of your own with boxes in COCO's format: docs/own_data.md.
_base_ = 'coco_detection.py'

data_preparation = (
    'set data_root of the datasets of train_dataloader, val_dataloader and '
    'test_dataloader to a folder that holds '
    'annotations/instances_{train,val}2017.json, train2017/*.jpg and '
    'val2017/*.jpg, or set ann_file and data_prefix too'
)

# A file that inherits from this sets them at its top: mmorepa hands them on.
variables = dict(
    max_epochs={'train_cfg.max_epochs': 1},
    image_size={
        'train_dataloader.dataset.pipeline.2.scale': 1,
        'val_dataloader.dataset.pipeline.1.scale': 1,
        'test_dataloader.dataset.pipeline.1.scale': 1,
    },
)

train_dataloader = dict(dataset=dict(data_root='data/custom'))
val_dataloader = dict(
    dataset=dict(
        data_root='data/custom',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(
                type='PackDetInputs',
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                    'instances',
                ),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
# The boxes come from the dataset, in the instances above, so that their file is named
# in one place. The size of an object is then that of its box, not of its outline.
val_evaluator = dict(ann_file=None)
test_evaluator = val_evaluator
