_base_ = [
    '../_base_/models/repvgg-a0_slim_28px.py',
    '../_base_/datasets/fashion_mnist_bs256.py',
    '../_base_/schedules/fashion_mnist_bs256_8e.py',
    '../_base_/default_runtime.py',
]

model = dict(backbone=dict(block='repvgg'))
randomness = dict(seed=0)
