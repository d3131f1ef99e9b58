import pytest
from scenes import CONFIGS
from tool_runs import tool


@pytest.fixture(scope='session')
def scenes_folder(tmp_path_factory):
    """A few scenes of real digits, as COCO and as Cityscapes have them."""
    digits = tool('dataset_converters/digits.py')
    out = tmp_path_factory.mktemp('scenes')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'NUM_SCENES', dict(train=6, val=3))
        splits = digits.split_digits()
        digits.write_coco(splits, out / 'coco')
        digits.write_cityscapes(splits, out / 'cityscapes')
    return out


@pytest.fixture(scope='session')
def short_config(scenes_folder, tmp_path_factory):
    """Writes a config that trains on the few scenes within seconds.

    Called with the name of a config for digits, without the number of its steps,
    and further lines of the config file.
    """

    def write(name, *lines):
        (base,) = CONFIGS.glob(f'digits/{name}*.py')
        is_detector = '_fpn_' in base.name
        folder = scenes_folder / ('coco' if is_detector else 'cityscapes')
        path = tmp_path_factory.mktemp('config') / f'{name}.py'
        parts = [
            f"_base_ = '{base}'",
            f"data = dict(dataset=dict(data_root='{folder}/'), num_workers=0,",
            '    persistent_workers=False)',
            'train_dataloader = dict(batch_size=2, **data)',
            'val_dataloader = data',
            'test_dataloader = data',
            # Statistics that a few steps suffice for, small steps, and no threshold of
            # scores or overlaps, so that there are boxes, with scores to compare, and
            # none comes or goes with the last bit of a sum.
            "norm_cfg = dict(type='BN', requires_grad=True, momentum=0.9)",
            'model = dict(backbone=dict(init_cfg=None, norm_cfg=norm_cfg))',
            "log_level = 'WARNING'",
        ]
        if is_detector:
            parts += [
                'optim_wrapper = dict(optimizer=dict(lr=0.001))',
                'every = dict(score_thr=0.0, nms=dict(iou_threshold=1.0))',
                "model['test_cfg'] = dict(rpn=every, rcnn=every, **every)",
                f"val_evaluator = dict(ann_file='{folder}/annotations/"
                "instances_val2017.json')",
                'test_evaluator = val_evaluator',
                'train_cfg = dict(max_epochs=1, val_interval=1)',
            ]
        else:
            parts += [
                'train_cfg = dict(max_iters=2, val_interval=2)',
                'default_hooks = dict(checkpoint=dict(interval=2))',
            ]
        path.write_text('\n'.join([*parts, *lines, '']))
        return path

    return write
