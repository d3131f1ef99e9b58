import logging
import sys

import pytest
from mmengine.config import Config
from runners import build_runner, colours_loader, tiny_config

from mmorepa.runs import keep_few_checkpoints


def config(folder, by_epoch=True, shown=False):
    length = dict(max_epochs=2) if by_epoch else dict(max_iters=6, val_interval=3)
    return tiny_config(
        folder,
        train_cfg=dict(by_epoch=by_epoch, **length),
        val_dataloader=colours_loader(),
        val_cfg=dict(),
        val_evaluator=dict(type='Logits'),
        custom_hooks=[dict(type='ProgressHook', is_shown=shown)],
    )


def test_says_what_was_chosen(tmp_path, capsys):
    runner = build_runner(config(tmp_path), ('train', 'val'), is_verbose=False)
    runner.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 20
    found = dict(line.split(None, 1) for line in lines if line.startswith(('m', 'd')))
    assert found['model'].startswith('TinyClassifier')
    assert 'length           2 epochs of 3 steps, 8 images each' in lines
    for row in ('training data', 'validation data', 'learning rate'):
        assert any(line.startswith(row) for line in lines)
    # No terminal: MMEngine's own lines say how far it is.
    assert sum('Epoch(train)' in line for line in lines) == 2
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'Hooks will be executed' in log and 'System environment' in log


@pytest.mark.parametrize('by_epoch', [True, False])
def test_one_line_moves(by_epoch, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    runner = build_runner(config(tmp_path, by_epoch, True), ('train',), False)
    runner.train()
    text = capsys.readouterr().out
    assert ('epoch 2/2  step 3/3  loss' if by_epoch else 'iteration 6/6  loss') in text
    assert 'images/s' in text and 'Epoch(train)' not in text
    runner.test()
    assert 'batch 3/3' in capsys.readouterr().out


def test_warnings_stay(tmp_path, capsys):
    runner = build_runner(config(tmp_path), ('train',), is_verbose=False)
    runner.logger.warning('Mind this.')
    runner.logger.log(logging.WARNING, '"FileClient" will be deprecated in future.')
    assert 'WARNING: Mind this.\n' in capsys.readouterr().out


class TestCheckpoints:
    def kept(self, evaluator, **hook):
        hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, **hook))
        cfg = Config(dict(default_hooks=hooks, val_evaluator=evaluator))
        keep_few_checkpoints(cfg)
        found = cfg.default_hooks.checkpoint
        return found.max_keep_ckpts, found.get('save_best')

    def test_three_and_the_best(self):
        assert self.kept(dict(type='Accuracy')) == (3, 'auto')
        assert self.kept([dict(type='mmseg.IoUMetric')]) == (3, 'mIoU')
        assert self.kept(dict(type='Mine')) == (3, None)
        assert self.kept(None) == (3, None)

    def test_what_the_config_says_stays(self):
        assert self.kept(dict(type='Accuracy'), max_keep_ckpts=-1) == (-1, None)
        assert self.kept(dict(type='Accuracy'), save_best=None) == (3, None)
