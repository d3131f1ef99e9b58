"""Builds models and runners from configs, for all toolboxes."""

import atexit
import copy
import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import MMLogger, print_log
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..analysis import unwrapped
from ..backbones import StagedBackbone
from ..converters import load_strictly, read_checkpoint
from ..hub import apply_variables, find_config
from .console import shorten
from .resume import newest_resumable, read_resumable
from .user_data import (
    argument_of,
    check_datasets,
    check_variables,
    name_broken_images,
)

# The metric that is the best checkpoint's, by the evaluator; 'auto' is its first.
_BEST = dict(Accuracy='auto', CocoMetric='auto', VOCMetric='auto', IoUMetric='mIoU')


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Reads and checks a config.

    Args:
        path (str): The file, or the name of a config of this package.
        options (dict, optional): ``--cfg-options``. Defaults to None.

    Returns:
        Config: With the options, and with a model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not Python, YAML or JSON, or has no model.
    """
    path = str(find_config(path))
    if Path(path).suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise ValueError(f'{path!r} is no config: these are .py, .yml or .json files')
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        # It may be in a base. MMEngine's functions call a config 'filename'.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [frame.f_locals.get('filename') for frame in frames]
        name = [name for name in names if str(name).endswith('.py')][-1]
        raise ValueError(f'{str(name)!r}, line {error.lineno}: {error.msg}') from error
    apply_variables(cfg, list(cfg))
    check_variables(cfg)
    if options is not None:
        merge_options(cfg, options)
    if not isinstance(cfg.get('model'), dict):
        raise ValueError(f"{path!r} has no 'model', which is what a config describes")
    return cfg


def merge_options(cfg: Config, options: dict) -> None:
    """Applies ``--cfg-options``.

    Args:
        cfg (Config): Changed in place.
        options (dict): Settings by their paths.

    Raises:
        ValueError: If one has no effect.
    """
    cfg.merge_from_dict(options)
    apply_variables(cfg, options)
    check_variables(cfg, options)


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


def build_loader(cfg: Config, phase: str) -> DataLoader:
    """The data of a phase, without a runner, read by this process.

    Nothing is downloaded: only training and testing, which build a runner, may do that.

    Args:
        cfg (Config): It is left as it is.
        phase (str): ``'train'``, ``'val'`` or ``'test'``.

    Returns:
        DataLoader: In the same order each time.

    Raises:
        FileNotFoundError: If data are missing, also those that could be downloaded.
        ValueError: If the config has none, or see :func:`check_data_folders`.
    """
    if cfg.get(f'{phase}_dataloader') is None:
        raise ValueError(f'the config has no {phase}_dataloader')
    cfg, scope = copy.deepcopy(cfg), cfg.get('default_scope', 'mmengine')
    loader = cfg[f'{phase}_dataloader']
    downloads = [d for d in _datasets(loader) if argument_of(d, 'download', scope)]
    for dataset in downloads:
        dataset['download'] = False
    check_data_folders(cfg, (phase,))
    init_default_scope(scope)
    loader.update(num_workers=0, persistent_workers=False)
    if scope == 'mmpretrain':
        loader.setdefault('collate_fn', dict(type='default_collate'))
    try:
        return Runner.build_dataloader(loader, seed=0)
    except RuntimeError as error:
        if not downloads:
            raise
        # The toolbox's own words advise a setting that was just turned off.
        raise FileNotFoundError(
            f'the data below {downloads[0].get("data_root")!r} are missing or damaged; '
            'only train and test download them'
        ) from error


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
    name = _type_name({'type': 'OptimWrapper', **cfg.optim_wrapper})
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
    """Whether MMEngine's launchers and loss scaling know the device."""
    return get_device() not in ('cpu', 'mps')


class _ShortRunner(Runner):
    """A runner whose log on the screen is short."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        shorten(logger)
        return logger


def build_runner(
    cfg: Config, phases: tuple[str, ...], is_verbose: bool = True
) -> Runner:
    """Checks data folders and checkpoints, then builds the runner.

    Args:
        cfg (Config): The complete config.
        phases (tuple[str, ...]): Out of ``'train'``, ``'val'`` and ``'test'``: those
            whose data will be read.
        is_verbose (bool): Show all of the log, not just what is for people. Defaults to
            True.

    Returns:
        Runner: Ready to train or test.

    Raises:
        FileNotFoundError: If a data folder or the checkpoint to load is missing.
        CheckpointError: If the checkpoint to test, or to resume from, does not fit
            the model. MMEngine would go on with what fits, down to nothing. That
            another one to start from does not fit the backbone is found later, when
            the runner loads it.
    """
    check_data_folders(cfg, phases)
    name_broken_images()
    start = cfg.get('load_from')
    if start and '://' not in start and not os.path.isfile(start):
        raise FileNotFoundError(f'no checkpoint at {start!r}')
    if cfg.launcher != 'none' and not _has_accelerator():
        _prepare_distributed_cpu(cfg)
    checkpoint = None
    if cfg.get('resume') and not start:
        start, checkpoint = newest_resumable(cfg.work_dir)
        # Not MMEngine's choice, which is what last_checkpoint says.
        cfg.load_from, cfg.resume = start, start is not None
    elif start and '://' not in start:  # Or else, the runner fetches it when it starts.
        if cfg.get('resume'):
            checkpoint = read_resumable(start)
        elif 'test' in phases:
            checkpoint = read_checkpoint(start)
    if cfg.get('resume') and checkpoint:
        _keep_seed(cfg, checkpoint['meta'])
    if 'runner_type' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = (Runner if is_verbose else _ShortRunner).from_cfg(cfg)
    if checkpoint and isinstance(runner.model, nn.Module):
        load_strictly(unwrapped(runner.model), checkpoint['state_dict'])
    elif start and isinstance(runner.model, nn.Module):
        for module in runner.model.modules():
            if isinstance(module, StagedBackbone):
                module.must_fit = True
    return runner


def _keep_seed(cfg: Config, meta: dict) -> None:
    """Restores the drawn seed where none is set; samplers are built with it."""
    randomness = cfg.get('randomness') or {}
    if randomness.get('seed') is None:
        cfg.randomness = dict(randomness, seed=meta.get('seed'))


def add_hook(cfg: Config, name: str) -> None:
    """Adds a hook with its defaults, unless the config has one of this type.

    Args:
        cfg (Config): Changed in place.
        name (str): The type of the hook.
    """
    custom = cfg.get('custom_hooks') or []
    hooks = [*custom, *(cfg.get('default_hooks') or {}).values()]
    if not any(_type_name(hook) == name for hook in hooks if hook):
        cfg.custom_hooks = [*custom, dict(type=name)]


def keep_few_checkpoints(cfg: Config) -> None:
    """Keeps the last three checkpoints and the best one, unless the config says more.

    MMEngine keeps one of every epoch. The best is kept where it is known which metric
    says so.

    Args:
        cfg (Config): Changed in place.
    """
    evaluators = cfg.get('val_evaluator') or [{'type': ''}]
    first = evaluators[0] if isinstance(evaluators, list) else evaluators
    for hook in filter(None, (cfg.get('default_hooks') or {}).values()):
        if _type_name(hook) == 'CheckpointHook' and 'max_keep_ckpts' not in hook:
            hook.max_keep_ckpts = 3
            if _type_name(first) in _BEST:
                hook.setdefault('save_best', _BEST[_type_name(first)])


def _type_name(node: dict) -> str:
    """The type in a config, which may be a class or a name with a scope."""
    kind = node['type']
    return kind.__name__ if isinstance(kind, type) else kind.rpartition('.')[-1]


def check_data_folders(cfg: Config, phases: tuple[str, ...]) -> None:
    """Checks that the data of these phases are there.

    A dataset that downloads what is missing, as mmpretrain's CIFAR10 does, may do so
    where the config has no other advice.

    Args:
        cfg (Config): The config. Its ``data_preparation``, if any, is the advice
            that the error gives.
        phases (tuple[str, ...]): Out of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If the ``data_root`` of a dataset is missing.
        ValueError: See :func:`check_datasets`.
    """
    datasets = {
        phase: list(_datasets(cfg.get(f'{phase}_dataloader'))) for phase in phases
    }
    for nodes in datasets.values():
        for dataset in nodes:
            root = dataset.get('data_root')
            if root and '://' not in root and not os.path.isdir(root):
                advice = cfg.get('data_preparation')
                scope = cfg.get('default_scope')
                if advice is None and argument_of(dataset, 'download', scope):
                    continue
                raise FileNotFoundError(
                    f'the data folder {root!r} is missing; '
                    f'{advice or "set data_root to where it is"}'
                )
    check_datasets(cfg, datasets)


def _datasets(node: object) -> Iterator[dict]:
    """Yields all dataset configs of a dataloader: wrappers, and wrapped ones."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _datasets(item)
    elif isinstance(node, dict):
        for item in (node.get('dataset'), *(node.get('datasets') or ())):
            if isinstance(item, dict):
                yield item
            yield from _datasets(item)


def _prepare_distributed_cpu(cfg: Config) -> None:
    """Sets up distributed runs on CPUs, where MMEngine expects GPUs."""
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
    # The threads end with the last object that holds the group: a wrapped model, in the
    # cycle of a runner and its loops.
    gc.collect()


def _replace_sync_bn(node: object) -> bool:
    """Replaces SyncBN by BN in a model config; returns whether there was any."""
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


def innermost(dataset: dict) -> dict:
    """The config of the dataset that a config's wrappers hold, or itself."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def use_tta(cfg: Config) -> None:
    """Turns on test-time augmentation.

    Args:
        cfg (Config): Changed in place. Without ``tta_model``, classifiers average
            over horizontal flips, as mmpretrain does.

    Raises:
        ValueError: If the config of another toolbox defines none.
    """
    dataset = innermost(cfg.test_dataloader.dataset)
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
        ValueError: If the config has no such hook, or there is no display for windows.
    """
    displays = [os.environ.get(name) for name in ('DISPLAY', 'WAYLAND_DISPLAY')]
    if show and sys.platform == 'linux' and not any(displays):
        # Matplotlib would draw and show nothing, in silence.
        raise ValueError(
            '--show needs a display for its windows, and neither DISPLAY nor '
            'WAYLAND_DISPLAY is set; --show-dir FOLDER writes the images to files'
        )
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
