_base_ = [
    '../_base_/models/resnet50.py',
    '../_base_/datasets/imagenet_bs64.py',
    '../_base_/schedules/imagenet_bs256_120e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(block='plain'))
