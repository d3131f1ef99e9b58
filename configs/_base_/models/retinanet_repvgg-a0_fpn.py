_base_ = 'retinanet_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='OREPARepVGG',
        arch='A0',
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
    neck=dict(in_channels=[48, 96, 192, 1280]),
)
