"""The steps from a config to a runner, in the order in which train.py takes them."""

import atexit
import gc
import os
import subprocess
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

# By launcher, the variables with the rank, the local rank and the number of processes.
_RANKS = {
    'slurm': ('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_NTASKS'),
    'mpi': tuple(f'OMPI_COMM_WORLD_{name}' for name in ('RANK', 'LOCAL_RANK', 'SIZE')),
}


def find_start(cfg: Config) -> Optional[dict]:
    """Finds the checkpoint that a training starts or resumes from.

    Args:
        cfg (Config): Changed in place. ``load_from`` and ``resume`` are set to the
            checkpoint, and a training that is resumed gets its former seed.

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
        # MMEngine would take the file that last_checkpoint names, even if damaged.
        cfg.load_from, checkpoint = newest_resumable(cfg.work_dir)
        cfg.resume = checkpoint is not None
    elif not is_remote:
        checkpoint = read_resumable(start)
    randomness = cfg.get('randomness') or {}
    if checkpoint and randomness.get('seed') is None:
        cfg.randomness = dict(randomness, seed=checkpoint['meta'].get('seed'))
    return checkpoint


def set_up_distributed_cpu(cfg: Config) -> None:
    """Sets up a distributed run on CPUs; MMEngine sets up all other runs.

    The processes communicate by gloo, and SyncBN becomes BN. If the launcher has not
    set the rank of this process, it is a ValueError.
    """
    if cfg.launcher == 'none' or has_accelerator():
        return
    if not torch.distributed.is_initialized():
        _name_ranks_as_torchrun(cfg.launcher)
        # MMEngine's own launcher would call torch.cuda.set_device.
        torch.distributed.init_process_group('gloo')
        # Threads of gloo that still run when Python ends abort the process.
        atexit.register(_leave_process_group)
    cfg.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **(cfg.get('model_wrapper_cfg') or {}),
        'broadcast_buffers': False,
        'device_ids': None,
    }
    nodes = [node for _, node in walk(cfg.model, 'model')]
    sync_bns = [node for node in nodes if node.get('type') == 'SyncBN']
    for node in sync_bns:
        node['type'] = 'BN'
    if sync_bns:
        print_log('SyncBN needs GPUs: training with BN, statistics per process.')


def make_runner(cfg: Config, is_verbose: bool = True) -> Runner:
    """Builds the runner of a config; the screen shows its whole log if verbose."""
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return (Runner if is_verbose else _ShortRunner).from_cfg(cfg)


def check_start(runner: Runner, checkpoint: Optional[dict]) -> None:
    """Refuses weights that do not fit; MMEngine would load those that fit, or none.

    Args:
        runner (Runner): Before it trains or tests.
        checkpoint (dict, optional): The checkpoint that it will load. With None,
            ``load_from`` starts the backbone, and the backbone checks it when the
            runner loads it.
    """
    if not isinstance(runner.model, nn.Module):  # FlexibleRunner builds it later.
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


def _name_ranks_as_torchrun(launcher: str) -> None:
    """Copies the rank of this process to the variables that PyTorch reads."""
    if launcher not in _RANKS:
        return
    environment = os.environ
    for name, source in zip(('RANK', 'LOCAL_RANK', 'WORLD_SIZE'), _RANKS[launcher]):
        if source not in environment:
            raise ValueError(f'--launcher {launcher}, and {source} is not set')
        environment[name] = environment[source]
    environment.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in environment and launcher == 'slurm':
        line = ['scontrol', 'show', 'hostnames', environment['SLURM_JOB_NODELIST']]
        hosts = subprocess.run(line, check=True, capture_output=True, text=True).stdout
        environment['MASTER_ADDR'] = hosts.split()[0]


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # The threads end when the wrapped model is freed, which refers to the group. It is
    # part of the reference cycle of a runner and its loops.
    gc.collect()
