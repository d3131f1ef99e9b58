# A plain network but for its stem, whose branches add next to nothing to a step.
_base_ = 'resnet34_4xb64_in1k.py'

model = dict(backbone=dict(stem_block='orepa'))
