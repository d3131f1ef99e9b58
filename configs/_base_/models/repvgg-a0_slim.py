# A quarter of RepVGG-A0's width, for images of 32x32 pixels and two CPU cores.
_base_ = 'repvgg-a0.py'

model = dict(
    backbone=dict(base_channels=16),
    head=dict(num_classes=10, in_channels=320, topk=(1,)),
)
