# To inherit from, for boxes of your own: docs/own_data.md.
_base_ = [
    '../_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/custom_coco.py',
    '../_base_/schedules/finetune.py',
    '../_base_/det_runtime.py',
]

# From the plain network: no pretraining of OREPA is needed.
model = dict(
    backbone=dict(block='orepa', init_cfg=dict(checkpoint='torchvision://resnet50'))
)
# A step moves the stem's kernel about as far as a plain one: see docs/transfer.md.
optim_wrapper = dict(optimizer=dict(lr=0.0025), paramwise_cfg=dict(stem_lr_mult=0.5))
train_cfg = dict(max_epochs=12)
default_hooks = dict(checkpoint=dict(save_best='auto'))
auto_scale_lr = dict(enable=False, base_batch_size=2)
