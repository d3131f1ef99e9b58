# A quarter of ResNet-18's width, for images of 32x32 pixels and two CPU cores.
_base_ = 'resnet18.py'

model = dict(
    backbone=dict(base_channels=16),
    head=dict(num_classes=10, in_channels=128, topk=(1,)),
)
