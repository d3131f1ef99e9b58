_base_ = 'resnet18-orepa_1xb32_folder.py'

weights = dict(type='Pretrained', checkpoint='torchvision://resnet50')
model = dict(backbone=dict(depth=50, init_cfg=weights), head=dict(in_channels=2048))
