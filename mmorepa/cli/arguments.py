"""The config that a command line asks for."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.device import is_cuda_available

from ..hub import find_config
from ..runs import merge_options, read_config
from ..utils.errors import OutputError
from ..utils.files import check_outputs

_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the common flags.

    Args:
        args (argparse.Namespace): With ``config`` and the flags of
            :func:`.add_common_arguments`. ``--cfg-options`` come last and so win.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    args.config = str(find_config(args.config))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    for name in _LOADERS:
        if cfg.get(name) is not None:
            cfg[name].setdefault('pin_memory', is_cuda_available())
            if args.no_pin_memory:
                cfg[name].pin_memory = False
            if cfg.get('default_scope') == 'mmpretrain':
                # mmpretrain's preprocessor wants stacked images; its own tools set
                # this default, which is not the runner's.
                cfg[name].setdefault('collate_fn', dict(type='default_collate'))
    if args.cfg_options is not None:
        merge_options(cfg, args.cfg_options)
    _check_copy(args.config, os.path.join(cfg.work_dir, os.path.basename(args.config)))
    return cfg


def _check_copy(path: str, copy: str) -> None:
    """Checks that the runner's copy of the config overwrites no other file."""
    if not os.path.exists(copy) or not os.path.samefile(copy, path):
        check_outputs([copy])
    elif Config.fromfile(path).dump() != Path(path).read_text():
        raise OutputError(
            f'{path!r} is in the work folder, where its copy with all settings goes, '
            'and would be lost; give another --work-dir'
        )
