import argparse
import os
from pathlib import Path

import pytest
from mmengine.config import Config

import mmorepa.cli.arguments as arguments_module
from mmorepa.cli import load_config
from mmorepa.cli.parser import add_common_arguments
from mmorepa.utils.errors import OutputError

DIGITS = (
    Path(__file__).parents[2] / 'configs/digits/resnet18-slim-orepa_1xb64_digits.py'
)


def arguments(*flags, config=DIGITS):
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_common_arguments(parser)
    return parser.parse_args([str(config), *map(str, flags)])


@pytest.fixture(autouse=True)
def local_rank(monkeypatch):
    """Set by load_config, and restored after the test."""
    monkeypatch.setenv('LOCAL_RANK', '0')


class TestLoadConfig:
    def test_missing(self):
        with pytest.raises(FileNotFoundError, match="no config at 'none.py'"):
            load_config(arguments(config='none.py'))

    def test_work_dir(self, tmp_path):
        assert load_config(arguments()).work_dir == f'work_dirs/{DIGITS.stem}'
        config = tmp_path / 'own.py'
        config.write_text(f'_base_ = {str(DIGITS)!r}\nwork_dir = "own"\n')
        assert load_config(arguments(config=config)).work_dir == 'own'
        args = arguments('--work-dir', 'flag', config=config)
        assert load_config(args).work_dir == 'flag'

    def test_options_win(self):
        args = arguments(
            '--work-dir',
            'flag',
            '--no-pin-memory',
            '--cfg-options',
            'work_dir=option',
            'val_dataloader.pin_memory=True',
            'model.backbone.strides=(1,2,2,1)',
            'train_cfg.max_epochs=3',
        )
        cfg = load_config(args)
        assert cfg.work_dir == 'option'
        assert cfg.val_dataloader.pin_memory is True
        assert cfg.test_dataloader.pin_memory is False
        assert tuple(cfg.model.backbone.strides) == (1, 2, 2, 1)
        assert cfg.train_cfg.max_epochs == 3

    @pytest.mark.parametrize('cuda', [False, True])
    def test_memory_is_pinned_for_gpus(self, monkeypatch, cuda):
        monkeypatch.setattr(arguments_module, 'is_cuda_available', lambda: cuda)
        cfg = load_config(arguments())
        loaders = cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader
        assert [loader.pin_memory for loader in loaders] == [cuda] * 3
        cfg = load_config(arguments('--no-pin-memory'))
        assert cfg.train_dataloader.pin_memory is False

    @pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet'])
    def test_images_are_stacked_for_classifiers_only(self, tmp_path, scope):
        config = tmp_path / 'own.py'
        config.write_text(
            f'default_scope = {scope!r}\nmodel = dict()\n'
            'train_dataloader = dict(dataset=dict(type="X"))\n'
            'val_dataloader = None\n'
        )
        cfg = load_config(arguments(config=config))
        found = cfg.train_dataloader.get('collate_fn')
        assert found == (dict(type='default_collate') if 'pre' in scope else None)
        assert cfg.val_dataloader is None

    def test_launcher(self, monkeypatch):
        assert load_config(arguments()).launcher == 'none'
        monkeypatch.delenv('LOCAL_RANK')
        cfg = load_config(arguments('--launcher', 'pytorch', '--local-rank', 3))
        assert cfg.launcher == 'pytorch'
        assert os.environ['LOCAL_RANK'] == '3'
        load_config(arguments('--local_rank', 5))
        assert os.environ['LOCAL_RANK'] == '3'  # torchrun's word counts.

    @pytest.mark.parametrize('pretty', [False, True])
    def test_config_in_the_work_folder(self, tmp_path, pretty):
        """A copy of MMEngine's may be replaced by the next, all else is kept."""
        config = tmp_path / DIGITS.name
        if pretty:
            Config.fromfile(DIGITS).dump(config)
        else:
            config.write_text(f'_base_ = {str(DIGITS)!r}  # mine\n')
        (tmp_path / 'link').symlink_to(tmp_path)
        for folder in (tmp_path, tmp_path / 'link'):
            args = arguments('--work-dir', folder, config=config)
            if pretty:
                load_config(args)
                continue
            with pytest.raises(OutputError, match='give another --work-dir'):
                load_config(args)
