"""A segmenter, trained by iterations, that goes on where it was killed."""

import shutil

import pytest
from mmengine.hooks import Hook
from runners import build_runner
from test_in_a_runner import read


class Losses(Hook):
    """Keeps the losses."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())


def losses_of(path, work_dir, workers, **options):
    cfg = read(
        path,
        work_dir,
        **{
            'train_cfg.max_iters': 5,
            'train_cfg.val_interval': 5,
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': workers,
            'train_dataloader.persistent_workers': workers > 0,
            'default_hooks.checkpoint.interval': 2,
            **options,
        },
    )
    runner = build_runner(cfg, ('train', 'val'))
    hook = Losses()
    runner.register_hook(hook)
    runner.train()
    return hook.losses


@pytest.mark.slow
def test_in_the_middle_of_an_epoch(short_config, tmp_path):
    """With random sizes, crops, colours and dropout; the newest file is damaged."""
    path = short_config('pspnet_r18-slim-orepa')
    expected = losses_of(path, tmp_path / 'whole', 0)
    assert len(set(expected)) == 5
    shutil.copytree(tmp_path / 'whole', tmp_path / 'killed')
    for workers, damaged, left in ((0, 'iter_5.pth', 1), (2, 'iter_4.pth', 3)):
        for name in ('iter_5.pth', damaged):
            (tmp_path / 'killed' / name).write_bytes(b'')
        assert (
            losses_of(path, tmp_path / 'killed', workers, resume=True)
            == expected[-left:]
        )
        shutil.rmtree(tmp_path / 'killed')
        shutil.copytree(tmp_path / 'whole', tmp_path / 'killed')
