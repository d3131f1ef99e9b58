"""Reads the config that a command line names."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.device import is_cuda_available

from ..hub import get_config, merge_options
from ..utils.errors import OutputError


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the common flags.

    Args:
        args (argparse.Namespace): With ``config`` and the flags of
            :func:`.add_common_arguments`. ``--cfg-options`` come last and so win.

    Raises:
        OutputError: If the runner's copy of the config would overwrite the config.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = get_config(args.config)
    path = Path(cfg.filename)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', path.stem)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name) is not None:
            cfg[name].setdefault('pin_memory', is_cuda_available())
            if args.no_pin_memory:
                cfg[name].pin_memory = False
            if cfg.get('default_scope') == 'mmpretrain':
                # MMPretrain's preprocessor needs stacked images. MMPretrain's own
                # tools set this default, and MMEngine's runner does not.
                cfg[name].setdefault('collate_fn', dict(type='default_collate'))
    if args.cfg_options is not None:
        merge_options(cfg, args.cfg_options)
    copy = Path(cfg.work_dir, path.name)
    is_same = copy.exists() and copy.samefile(path)
    if is_same and Config.fromfile(path).dump() != path.read_text():
        raise OutputError(
            f'{str(path)!r} is in the work folder, where its copy with all settings '
            'goes, and would be lost; give another --work-dir'
        )
    return cfg
