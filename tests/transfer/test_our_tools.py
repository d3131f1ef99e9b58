"""Detectors and segmenters through this package's tools, on real images."""

import json

import pytest
import torch
from helpers import import_models
from tool_runs import run_runner

from mmorepa.converters import read_checkpoint

pytestmark = pytest.mark.slow

# A multiplier for a frozen stem is an error.
OPTIONS = """
norm_cfg['type'] = 'SyncBN'
model['backbone'].update(norm_eval=True, frozen_stages=1, with_cp=True)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4), accumulative_counts=2, paramwise_cfg=dict(_delete_=True)
)
custom_hooks = [dict(type='EMAHook', momentum=0.5)]
"""
TOOLBOXES = {
    'mmdet': (
        'retinanet_r18-slim-orepa_fpn',
        'train_cfg = dict(max_epochs=2, val_interval=2)',
    ),
    'mmseg': (
        'pspnet_r18-slim-orepa',
        'train_cfg = dict(max_iters=4, val_interval=4)',
    ),
}


@pytest.mark.parametrize('scope', TOOLBOXES)
def test_options_of_training_together(scope, short_config, tmp_path):
    import_models(scope)
    config = short_config(*TOOLBOXES[scope], OPTIONS)
    run_runner('train.py', config, '--work-dir', tmp_path, '--amp', '--no-validate')
    files = sorted(tmp_path.glob('*.pth'))
    assert len(files) == 2
    first, last = (read_checkpoint(str(path)) for path in files)
    assert last['ema_state_dict']
    before, after = first['state_dict'], last['state_dict']
    assert all(torch.isfinite(value).all() for value in after.values())
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert any(key.startswith('backbone.layer3.') for key in changed)
    fixed = ('backbone.stem.', 'backbone.layer1.')
    assert not [key for key in changed if key.startswith(fixed)]
    assert not [key for key in changed if 'backbone' in key and 'running' in key]
    assert run_runner('test.py', config, files[-1], '--work-dir', tmp_path, '--deploy')


def losses(work_dir):
    """Of the last run in a folder."""
    (*_, path) = sorted(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line['loss'] for line in lines if 'loss' in line]


def test_goes_on_in_the_middle_of_an_epoch(short_config, tmp_path):
    """With random sizes, crops, colours and dropout; the newest file is damaged."""
    import_models('mmseg')
    config = short_config(
        'pspnet_r18-slim-orepa',
        'train_cfg = dict(max_iters=5, val_interval=9)',
        "default_hooks['logger'] = dict(interval=1)",
    )
    line = ['train.py', config, '--work-dir', tmp_path]
    run_runner(*line, options=['visualizer.name=a'])
    expected = losses(tmp_path)
    assert len(set(expected)) == 5
    (tmp_path / 'iter_5.pth').unlink()
    (tmp_path / 'iter_4.pth').write_bytes(b'')
    options = ['visualizer.name=b', 'train_dataloader.num_workers=2']
    run_runner(*line, '--resume', options=options)
    assert losses(tmp_path) == expected[2:]
