# Images of your own with boxes in COCO's format: docs/own_data.md.
_base_ = 'coco_detection.py'

data_preparation = (
    'set data_root of the datasets of train_dataloader, val_dataloader and '
    'test_dataloader to a folder that holds '
    'annotations/instances_{train,val}2017.json, train2017/*.jpg and '
    'val2017/*.jpg, or set ann_file and data_prefix too'
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
