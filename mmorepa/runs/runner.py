"""The steps from a config to a runner, in the order in which train.py takes them."""

import atexit
import gc
import os
from typing import Optional

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger, print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from ..analysis import unwrapped
from ..backbones import StagedBackbone
from ..converters import load_strictly
from .config import has_accelerator
from .console import shorten
from .data import walk
from .resume import newest_resumable, read_resumable


def find_start(cfg: Config) -> Optional[dict]:
    """Finds the checkpoint that a training starts or resumes from.

    Args:
        cfg (Config): Changed in place: ``load_from`` and ``resume`` say what was found,
            and a training that is resumed gets the seed that it drew.

    Returns:
        dict | None: The checkpoint to resume from, if it is a local file.

    Raises:
        FileNotFoundError: If ``load_from`` is missing.
        CheckpointError: If nothing in the work folder can be resumed from.
    """
    start, checkpoint = cfg.get('load_from'), None
    is_remote = start and '://' in start  # The runner downloads it when it starts.
    if start and not is_remote and not os.path.isfile(start):
        raise FileNotFoundError(f'no checkpoint at {start!r}')
    if not cfg.get('resume'):
        return None
    if not start:
        # MMEngine would take what the file last_checkpoint names, damaged or not.
        cfg.load_from, checkpoint = newest_resumable(cfg.work_dir)
        cfg.resume = checkpoint is not None
    elif not is_remote:
        checkpoint = read_resumable(start)
    randomness = cfg.get('randomness') or {}
    if checkpoint and randomness.get('seed') is None:
        cfg.randomness = dict(randomness, seed=checkpoint['meta'].get('seed'))
    return checkpoint


def set_up_distributed_cpu(cfg: Config) -> None:
    """Prepares a distributed run on CPUs; nothing where there is a GPU or the like.

    The processes talk by gloo, and SyncBN becomes BN.
    """
    if cfg.launcher == 'none' or has_accelerator():
        return
    # MMEngine's launchers call it.
    torch.cuda.set_device = lambda device: None
    cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
    # Threads of gloo that still run when Python ends abort the process.
    atexit.register(_leave_process_group)
    unused = cfg.get('find_unused_parameters', False)
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        broadcast_buffers=False, find_unused_parameters=unused
    )
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)
    for _, node in walk(cfg.model, 'model'):
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
    print_log('Without GPUs: SyncBN is BN, with statistics per process.')


def make_runner(cfg: Config, is_verbose: bool = True) -> Runner:
    """Builds the runner of a config; the screen shows all of its log, or little."""
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return (Runner if is_verbose else _ShortRunner).from_cfg(cfg)


def check_start(runner: Runner, checkpoint: Optional[dict]) -> None:
    """Refuses weights that do not fit: MMEngine goes on with what fits, or nothing.

    Args:
        runner (Runner): Before it trains or tests.
        checkpoint (dict, optional): What it will load. None stands for a ``load_from``
            that starts the backbone, which is checked when the runner loads it.
    """
    if not isinstance(runner.model, nn.Module):  # A FlexibleRunner builds it later.
        return
    if checkpoint is not None:
        load_strictly(unwrapped(runner.model), checkpoint['state_dict'])
    elif runner.cfg.get('load_from'):
        for module in runner.model.modules():
            if isinstance(module, StagedBackbone):
                module.refuse_misfits()


class _ShortRunner(Runner):
    """A runner whose log on the screen is short."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        shorten(logger)
        return logger


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # The threads end with the last object that holds the group: a wrapped model, in the
    # cycle of a runner and its loops.
    gc.collect()
