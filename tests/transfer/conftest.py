import os
import subprocess
import sys

import pytest
from scenes import CONFIGS, ROOT, digits_tool


@pytest.fixture(scope='session')
def run_python():
    """Runs a Python process in the repository root; fails with what it printed."""

    def run(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
        )
        assert done.returncode == 0, f'{done.stdout[-3000:]}\n{done.stderr[-5000:]}'
        return done.stdout

    return run


@pytest.fixture(scope='session')
def scenes_folder(tmp_path_factory):
    """A few scenes of real digits, as COCO and as Cityscapes have them."""
    digits = digits_tool()
    digits.NUM_SCENES = dict(train=6, val=3)
    out = tmp_path_factory.mktemp('scenes')
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
        evaluator = (
            f"val_evaluator = dict(ann_file='{folder}/annotations/"
            "instances_val2017.json')\ntest_evaluator = val_evaluator\n"
            'train_cfg = dict(max_epochs=1, val_interval=1)\n'
            if is_detector
            else 'train_cfg = dict(max_iters=2, val_interval=2)\n'
            'default_hooks = dict(checkpoint=dict(interval=2))\n'
        )
        path.write_text(
            f"_base_ = '{base}'\n"
            f"data = dict(dataset=dict(data_root='{folder}/'), num_workers=0,\n"
            '    persistent_workers=False)\n'
            'train_dataloader = dict(**data)\n'
            'val_dataloader = data\n'
            'test_dataloader = data\n'
            # Statistics that a few steps suffice for, small steps, and no threshold of
            # scores or overlaps, so that there are boxes, with scores to compare, and
            # none comes or goes with the last bit of a sum.
            "norm_cfg = dict(type='BN', requires_grad=True, momentum=0.9)\n"
            'model = dict(backbone=dict(init_cfg=None, norm_cfg=norm_cfg))\n'
            + (
                'optim_wrapper = dict(optimizer=dict(lr=0.001))\n'
                'every = dict(score_thr=0.0, nms=dict(iou_threshold=1.0))\n'
                "model['test_cfg'] = dict(rpn=every, rcnn=every, **every)\n"
                if is_detector
                else ''
            )
            + "log_level = 'WARNING'\n"
            + evaluator
            + '\n'.join(lines)
            + '\n'
        )
        return path

    return write
