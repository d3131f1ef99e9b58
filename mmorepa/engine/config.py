"""From a config and a command line to a runner, for all toolboxes alike."""

import argparse
import atexit
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device, is_cuda_available
from mmengine.logging import print_log
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from ..utils.errors import CheckpointError
from .checkpoint import load_strictly, read_checkpoint
from .comparison import unwrapped

_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that training and testing share, named as mmpretrain's."""
    parser.add_argument('--work-dir', help='the folder for logs and checkpoints')
    parser.add_argument(
        '--no-pin-memory',
        action='store_true',
        help='do not pin memory in dataloaders',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings that override the config, for example '
        'train_cfg.max_epochs=10 model.backbone.strides="(1,2,2,1)"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run were started',
    )
    # torch.distributed.launch passes it with a hyphen since PyTorch 2.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the common flags.

    Args:
        args (argparse.Namespace): With ``config`` and the flags of
            :func:`add_common_arguments`.

    Returns:
        Config: ``--cfg-options`` come last and so win.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not os.path.isfile(args.config):
        raise FileNotFoundError(f'no config at {args.config!r}')
    cfg = Config.fromfile(args.config)
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
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, in eval mode on the CPU.

    Its ``init_cfg`` is not run: a checkpoint will give every weight.

    Args:
        cfg (Config): Of a classifier, detector or segmenter.

    Returns:
        nn.Module: The model.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:  # The runner hands it on in the same way.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(cfg.model).eval()


def use_amp(cfg: Config) -> None:
    """Turns on mixed-precision training, with loss scaling where it applies.

    On a machine without accelerator, where MMEngine's ``AmpOptimWrapper`` refuses
    to run, :class:`BFloat16OptimWrapper` is used. Folded wrappers stay folded.

    Args:
        cfg (Config): Changed in place.

    Raises:
        ValueError: If the config has an optimizer wrapper that is neither plain nor
            already one for mixed precision.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    # Some configs hold the class itself, others a name with a scope.
    name = kind.__name__ if isinstance(kind, type) else kind.rpartition('.')[-1]
    folded = 'Folded' if name.startswith('Folded') else ''
    if name in (f'{folded}AmpOptimWrapper', f'{folded}BFloat16OptimWrapper'):
        return
    if name != f'{folded}OptimWrapper':
        raise ValueError(
            '--amp replaces OptimWrapper and FoldedOptimWrapper by their '
            f'mixed-precision forms; found {name!r} in the config: set mixed precision '
            'there'
        )
    if _has_accelerator():
        cfg.optim_wrapper.type = f'{folded}AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = f'{folded}BFloat16OptimWrapper'
        print_log('No accelerator: --amp trains in bfloat16 on the CPU.')


def _has_accelerator() -> bool:
    """Whether there is one that MMEngine's launchers and loss scaling know."""
    return get_device() not in ('cpu', 'mps')


def build_runner(cfg: Config, phases: tuple[str, ...]) -> Runner:
    """Builds the runner after checks whose errors a user can act upon.

    Args:
        cfg (Config): The complete config.
        phases (tuple[str, ...]): Out of ``'train'``, ``'val'`` and ``'test'``: those
            whose data will be read.

    Returns:
        Runner: Ready to train or test.

    Raises:
        FileNotFoundError: If a data folder or the checkpoint to load is missing.
        CheckpointError: If the checkpoint to test, or to resume from, does not fit
            the model. MMEngine would go on with what fits, down to nothing.
    """
    check_data_folders(cfg, phases)
    start = cfg.get('load_from')
    if start and '://' not in start and not os.path.isfile(start):
        raise FileNotFoundError(f'no checkpoint at {start!r}')
    if cfg.launcher != 'none' and not _has_accelerator():
        _prepare_distributed_cpu(cfg)
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    if cfg.get('resume') and not start:
        start = find_latest_checkpoint(runner.work_dir)
    if start and (cfg.get('resume') or 'test' in phases):
        _check_checkpoint(runner.model, start, cfg.get('resume'))
    return runner


def _check_checkpoint(model: object, path: str, resumes: bool) -> None:
    if '://' in path or not isinstance(model, nn.Module):
        return  # Fetched, or built, by the runner when it starts.
    checkpoint = read_checkpoint(path)
    load_strictly(unwrapped(model), checkpoint['state_dict'])
    missing = {'meta', 'message_hub', 'optimizer'} - checkpoint.keys()
    if resumes and missing:
        raise CheckpointError(
            f'{path!r} holds weights but not the state of a training run to resume '
            f'({", ".join(sorted(missing))} missing); to start a new run from these '
            'weights: --cfg-options load_from=...'
        )


def check_data_folders(cfg: Config, phases: tuple[str, ...]) -> None:
    """Checks that the data of these phases are there.

    Args:
        cfg (Config): The config. Its ``data_preparation``, if any, is the advice
            that the error gives.
        phases (tuple[str, ...]): Out of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If the ``data_root`` of a dataset is missing.
    """
    for phase in phases:
        for dataset in _datasets(cfg.get(f'{phase}_dataloader')):
            root = dataset.get('data_root')
            if root and '://' not in root and not os.path.isdir(root):
                advice = cfg.get('data_preparation', 'set data_root to where it is')
                raise FileNotFoundError(
                    f'the data folder {root!r} is missing; {advice}'
                )


def _datasets(node: object) -> Iterator[dict]:
    """The dataset configs inside a dataloader's: wrappers, and what they hold."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _datasets(item)
    elif isinstance(node, dict):
        for item in (node.get('dataset'), *(node.get('datasets') or ())):
            if isinstance(item, dict):
                yield item
            yield from _datasets(item)


USER_ERRORS = (
    CheckpointError,
    FileExistsError,
    FileNotFoundError,
    KeyError,
    ValueError,
)


@contextmanager
def one_line_errors(
    kinds: tuple[type[Exception], ...] = USER_ERRORS,
) -> Iterator[None]:
    """Ends the program with one line for errors that are the user's to mend.

    Set ``MMOREPA_TRACEBACK=1`` to see where they come from.

    Args:
        kinds (tuple[type[Exception], ...]): Which errors. Defaults to all that bad
            arguments, configs and files cause.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get('MMOREPA_TRACEBACK'):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f'error: {" ".join(str(text).split())}')


def _prepare_distributed_cpu(cfg: Config) -> None:
    """Makes up for what MMEngine takes for granted: a GPU per process."""
    if not torch.distributed.is_initialized():
        _name_ranks_as_torchrun(cfg.launcher)
        # MMEngine's own launcher would call torch.cuda.set_device.
        torch.distributed.init_process_group('gloo')
        # Threads of gloo's that still run when Python ends abort the process.
        atexit.register(_leave_process_group)
    cfg.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'find_unused_parameters': cfg.get('find_unused_parameters', False),
        **(cfg.get('model_wrapper_cfg') or {}),
        'broadcast_buffers': False,
        'device_ids': None,
    }
    if _replace_sync_bn(cfg.model):
        print_log('SyncBN needs GPUs: training with BN, statistics per process.')


_RANKS = {
    'slurm': ('SLURM_PROCID', 'SLURM_LOCALID', 'SLURM_NTASKS'),
    'mpi': tuple(f'OMPI_COMM_WORLD_{name}' for name in ('RANK', 'LOCAL_RANK', 'SIZE')),
}


def _name_ranks_as_torchrun(launcher: str) -> None:
    if launcher not in _RANKS:
        return
    environment = os.environ
    for name, theirs in zip(('RANK', 'LOCAL_RANK', 'WORLD_SIZE'), _RANKS[launcher]):
        if theirs not in environment:
            raise ValueError(f'--launcher {launcher}, and {theirs} is not set')
        environment[name] = environment[theirs]
    environment.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in environment and launcher == 'slurm':
        line = ['scontrol', 'show', 'hostnames', environment['SLURM_JOB_NODELIST']]
        hosts = subprocess.run(line, check=True, capture_output=True, text=True).stdout
        environment['MASTER_ADDR'] = hosts.split()[0]


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _replace_sync_bn(node: object) -> bool:
    """Replaces SyncBN by BN inside a model config; whether there was any."""
    found = isinstance(node, dict) and node.get('type') == 'SyncBN'
    if found:
        node['type'] = 'BN'
    if isinstance(node, dict):
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return False
    for value in node:  # Every one: any() would stop at the first.
        found |= _replace_sync_bn(value)
    return found


def use_tta(cfg: Config) -> None:
    """Turns on test-time augmentation.

    Args:
        cfg (Config): Changed in place. Without ``tta_model``, classifiers average
            over horizontal flips, as mmpretrain does.

    Raises:
        ValueError: If the config of another toolbox defines none.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # Wrappers hold the real one.
        dataset = dataset.dataset
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        if cfg.get('default_scope') != 'mmpretrain':
            raise ValueError('--tta needs tta_model and tta_pipeline in the config')
        cfg.tta_model = dict(type='AverageClsScoreTTA')
        *steps, pack = copy.deepcopy(dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
        cfg.tta_pipeline = [
            *steps,
            dict(type='TestTimeAug', transforms=[flips, [pack]]),
        ]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def use_visualization(
    cfg: Config, show: bool, show_dir: Optional[str], interval: int, wait_time: float
) -> None:
    """Turns on the toolbox's hook that draws predictions.

    Args:
        cfg (Config): Changed in place.
        show (bool): Whether to open windows.
        show_dir (str, optional): Where to write images.
        interval (int): Draws every so many images.
        wait_time (float): Seconds that a window stays.

    Raises:
        ValueError: If the config has no such hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(
            '--show and --show-dir need a visualization hook in default_hooks'
        )
    hook.update(show=show, wait_time=wait_time, interval=interval)
    if cfg.get('default_scope') == 'mmpretrain':
        hook.update(enable=True, out_dir=show_dir)
    else:
        hook.draw = True
        if show_dir is not None:
            cfg.visualizer.save_dir = show_dir
