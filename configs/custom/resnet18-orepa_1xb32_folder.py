# To inherit from, for images of your own: docs/own_data.md.
_base_ = [
    '../_base_/models/resnet18.py',
    '../_base_/datasets/custom_folder.py',
    '../_base_/schedules/finetune.py',
    '../_base_/default_runtime.py',
]

# From the plain network: no pretraining of OREPA is needed.
weights = dict(type='Pretrained', checkpoint='torchvision://resnet18')
model = dict(backbone=dict(block='orepa', init_cfg=weights), head=dict(topk=(1,)))
# A step moves the stem's kernel about as far as a plain one: see docs/transfer.md.
optim_wrapper = dict(paramwise_cfg=dict(stem_lr_mult=0.5))
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best='auto'))
auto_scale_lr = dict(base_batch_size=32)
