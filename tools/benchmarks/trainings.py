"""A training of a config as a job: in a process of its own, with what it measured."""

import copy
import importlib
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

# Before PyTorch is loaded. It would otherwise look for GPUs by starting CUDA, which the
# processes forked from this one then cannot use.
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from studies import ROOT, end_with_parent

from mmorepa import switch_to_deploy
from mmorepa.analysis.complexity import count_parameters


class Point(NamedTuple):
    """A validation, and what the epochs before it took, without those validations."""

    epoch: int
    metric: float
    # By the clock.
    seconds: float
    # Of all cores, by the process itself.
    cpu_seconds: float


class Training(NamedTuple):
    """What a training left."""

    # Of the last validation; NaN if the training diverged.
    metric: float
    # Of the whole process, and of the cores with what it started.
    seconds: float
    cpu_seconds: float
    device: str
    # Of the network in its deployed form.
    deployed_parameters: int
    curve: list[Point]


@HOOKS.register_module(force=True)  # Tests load this module under several names.
class RecordHook(Hook):
    """Writes what :class:`Training` has to tell, as ``record.json``."""

    # The end of an epoch comes before its checkpoint.
    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        self._seconds = self._cpu_seconds = 0.0
        self._curve = []

    def before_train_epoch(self, runner: Runner) -> None:
        self._count(-1)

    def after_train_epoch(self, runner: Runner) -> None:
        self._count(1)

    def _count(self, sign: int) -> None:
        if torch.cuda.is_available():  # Which may still be at work.
            torch.cuda.synchronize()
        self._seconds += sign * time.perf_counter()
        self._cpu_seconds += sign * time.process_time()

    def after_val_epoch(
        self, runner: Runner, metrics: Optional[dict[str, float]] = None
    ) -> None:
        point = (runner.epoch, metrics, self._seconds, self._cpu_seconds)
        self._curve.append(point)

    def after_train(self, runner: Runner) -> None:
        parameters = [*runner.model.parameters()]
        is_gpu = parameters[0].is_cuda
        deployed = switch_to_deploy(copy.deepcopy(runner.model))
        record = dict(
            device=torch.cuda.get_device_name() if is_gpu else 'cpu',
            deployed_parameters=count_parameters(deployed),
            # A loss that is not finite leaves weights that are not.
            diverged=not all(p.isfinite().all() for p in parameters),
            curve=self._curve,
        )
        (Path(runner.work_dir) / 'record.json').write_text(json.dumps(record))


def epochs_options(epochs: int) -> dict:
    """The options that give the recipes of ``configs/`` another length.

    The recipes have a warm-up and then a cosine. The one validation comes after the
    last epoch. Without a GPU, a process loads its own data and keeps to one core.
    """
    options = {
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs,
        'param_scheduler.1.T_max': epochs,
        'param_scheduler.1.end': epochs,
        'default_hooks.checkpoint.interval': epochs,
        'default_hooks.checkpoint.save_optimizer': False,
    }
    workers = int(torch.cuda.is_available())
    for split in ('train', 'val'):
        options[f'{split}_dataloader.num_workers'] = workers
        options[f'{split}_dataloader.persistent_workers'] = workers > 0
    return options


def merged(config: Path, options: Mapping) -> Config:
    """A config with some changes, as ``--cfg-options`` make them."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(options))
    return cfg


def train(config: Path, options: Mapping, work_dir: Path, metric: str) -> Training:
    """Trains a config by ``tools/train.py``, in a process of its own.

    Args:
        config (Path): The config file.
        options (Mapping): What to change in it, by dotted key.
        work_dir (Path): For logs and checkpoints; what is in it is removed.
        metric (str): The name of what the validation measures.

    Raises:
        RuntimeError: If the training fails.
    """
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    cfg = merged(config, options)
    cfg.custom_hooks = [*cfg.get('custom_hooks', ()), dict(type='RecordHook')]
    file, log = work_dir / 'run.py', work_dir / 'output.log'
    cfg.dump(file)
    for part in ('datasets', 'evaluation', 'models', 'visualization'):
        importlib.import_module(f'{cfg.default_scope}.{part}')
    line = ['tools/train.py', str(file), '--work-dir', str(work_dir)]
    # A fork has all that is imported here: imports take longer than a short training.
    context = multiprocessing.get_context('fork')
    process = context.Process(target=_run_script, args=(line, log))
    began, used = time.perf_counter(), _seconds_of_children()
    process.start()
    process.join()
    seconds, used = time.perf_counter() - began, _seconds_of_children() - used
    if process.exitcode:
        *_, last = log.read_text().split('\n')[:-1] or ['no output']
        if process.exitcode < 0:  # By a system without memory left, for one.
            last = f'it was killed by signal {-process.exitcode}'
        raise RuntimeError(f'a training of {config.name} failed ({log}): {last}')
    record = json.loads((work_dir / 'record.json').read_text())
    curve = [
        Point(epoch, metrics[metric], *spent)
        for epoch, metrics, *spent in record['curve']
    ]
    return Training(
        metric=math.nan if record['diverged'] else curve[-1].metric,
        seconds=seconds,
        cpu_seconds=used,
        device=record['device'],
        deployed_parameters=record['deployed_parameters'],
        curve=curve,
    )


def _seconds_of_children() -> float:
    """What all processes that this one has waited for have used, of all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run_script(line: Sequence[str], log: Path) -> None:
    """Runs a script of this repository, with all that it prints in a file."""
    end_with_parent()
    # Of this process and of those that it starts.
    sys.stdout = sys.stderr = log.open('w', buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    sys.argv = list(line)
    runpy.run_path(str(ROOT / line[0]), run_name='__main__')


def last_checkpoint(work_dir: Path) -> Optional[Path]:
    """The weights that a training in this folder ended with, if it did."""
    path = work_dir / 'last_checkpoint'
    return Path(path.read_text().strip()) if path.is_file() else None
