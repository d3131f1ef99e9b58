"""What experiments of many trainings share: run, resume, record, compare.

A study is a list of jobs. Each trains a config in a process of its own and gives a row
of a CSV file, which is written whole after every job: a study that was killed goes on
with the jobs whose rows are missing.
"""

import argparse
import copy
import csv
import importlib
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, Optional, Union

# Before PyTorch is loaded. It would otherwise look for GPUs by starting CUDA, which the
# processes forked from this one then cannot use.
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')

import torch
from filelock import FileLock, Timeout
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmorepa import switch_to_deploy
from mmorepa.analysis.complexity import count_parameters
from mmorepa.cli import positive
from mmorepa.utils.errors import OutputError
from mmorepa.utils.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]


class Training(NamedTuple):
    """What a training left.

    Args:
        metric (float): What the last validation measured; NaN if the training diverged.
        seconds (float): How long the whole process took.
        cpu_seconds (float): Of all cores, by the process and those that it started.
        checkpoint (Path, optional): The weights after the last epoch, if saved.
        device (str): What it ran on.
        deployed_parameters (int): Of the network in its deployed form.
        curve (list[Point]): All validations.
    """

    metric: float
    seconds: float
    cpu_seconds: float
    checkpoint: Optional[Path]
    device: str
    deployed_parameters: int
    curve: list['Point']


class Point(NamedTuple):
    """A validation, and what the epochs before it took, without those validations.

    Args:
        epoch (int): How many there were.
        metric (float): What was measured.
        seconds (float): By the clock.
        cpu_seconds (float): Of all cores, by the process itself.
    """

    epoch: int
    metric: float
    seconds: float
    cpu_seconds: float


@HOOKS.register_module(force=True)  # Tests load this module under several names.
class RecordHook(Hook):
    """Writes what :class:`Training` has to tell, as ``record.json``."""

    # The end of an epoch comes before its checkpoint.
    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        self._spent = (0.0, 0.0)
        self._curve: list[dict] = []

    def before_train_epoch(self, runner: Runner) -> None:
        self._began = self._now()

    def after_train_epoch(self, runner: Runner) -> None:
        parts = zip(self._spent, self._began, self._now())
        self._spent = tuple(spent + now - began for spent, began, now in parts)

    def after_val_epoch(
        self, runner: Runner, metrics: Optional[dict[str, float]] = None
    ) -> None:
        times = zip(('seconds', 'cpu_seconds'), self._spent)
        self._curve.append(dict(epoch=runner.epoch, metrics=metrics, **dict(times)))

    def after_train(self, runner: Runner) -> None:
        is_gpu = next(runner.model.parameters()).is_cuda
        deployed = switch_to_deploy(copy.deepcopy(runner.model))
        record = dict(
            device=torch.cuda.get_device_name() if is_gpu else 'cpu',
            deployed_parameters=count_parameters(deployed),
            # A loss that is not finite leaves weights that are not.
            diverged=not all(p.isfinite().all() for p in runner.model.parameters()),
            curve=self._curve,
        )
        (Path(runner.work_dir) / 'record.json').write_text(json.dumps(record))

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():  # Which may still be at work.
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def is_gpu_there() -> bool:
    """Whether trainings run on a GPU; see the top of this module."""
    return torch.cuda.is_available()


def add_study_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the number of seeds, the folder, and whether to train at all.

    Args:
        parser (argparse.ArgumentParser): That of the study.
        name (str): Of its folder below ``work_dirs``.
    """
    parser.add_argument(
        '--seeds', type=positive, default=5, help='how many of them (default: 5)'
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs', name),
        help='the folder for results.csv, its tables and its figure, and the runs; one '
        f'process at a time works in it (default: work_dirs/{name})',
    )
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='train nothing; write tables and figure of the rows that are there',
    )


def add_report_arguments(
    parser: argparse.ArgumentParser, name: str, jobs: str, tables: str
) -> None:
    """Adds how many jobs run side by side, and where their tables and figures go.

    Args:
        parser (argparse.ArgumentParser): That of the study.
        name (str): Of its folder below ``work_dirs``.
        jobs (str): What runs side by side.
        tables (str): The file in that folder that has the tables.
    """
    parser.add_argument(
        '--jobs',
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help=f'{jobs} side by side (default: one for each core)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs', name),
        help='the folder for results.csv, tables, figures and what else is written; '
        f'one process at a time works in it (default: work_dirs/{name})',
    )
    parser.add_argument(
        '--document',
        type=Path,
        help=f'put tables and figures into this Markdown file instead of {tables}, '
        'between its comments <!-- begin NAME --> and <!-- end NAME -->',
    )
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='run nothing; write tables and figures of all rows that are there',
    )


def epochs_options(epochs: int, workers: int = 0) -> dict:
    """The options that give the recipes of ``configs/`` another length.

    They have a warm-up and then a cosine. The one validation comes after the last
    epoch.

    Args:
        epochs (int): How many.
        workers (int): Processes that load data, for each split. Defaults to 0: the
            process itself, so that a training keeps to one core.

    Returns:
        dict: By dotted key.
    """
    loading = dict(num_workers=workers, persistent_workers=workers > 0)
    return {
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs,
        'param_scheduler.1.T_max': epochs,
        'param_scheduler.1.end': epochs,
        'default_hooks.checkpoint.interval': epochs,
        'default_hooks.checkpoint.save_optimizer': False,
        **{
            f'{split}_dataloader.{key}': value
            for split in ('train', 'val')
            for key, value in loading.items()
        },
    }


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

    Returns:
        Training: Its results.

    Raises:
        RuntimeError: If the training fails, or validates nothing by that name.
    """
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    cfg = merged(config, options)
    cfg.custom_hooks = [*cfg.get('custom_hooks', ()), dict(type='RecordHook')]
    file, log = work_dir / 'run.py', work_dir / 'output.log'
    cfg.dump(file)
    _import_toolbox(cfg.default_scope)
    line = ['tools/train.py', str(file), '--work-dir', str(work_dir)]
    # A fork has all that is imported here: imports take longer than a short training.
    process = multiprocessing.get_context('fork').Process(
        target=_run_script, args=(line, log)
    )
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
        Point(at['epoch'], at['metrics'][metric], at['seconds'], at['cpu_seconds'])
        for at in record['curve']
        if metric in at['metrics']
    ]
    if not curve:
        raise RuntimeError(f'no {metric!r} was measured, see {log}')
    return Training(
        metric=math.nan if record['diverged'] else curve[-1].metric,
        seconds=seconds,
        cpu_seconds=used,
        checkpoint=last_checkpoint(work_dir),
        device=record['device'],
        deployed_parameters=record['deployed_parameters'],
        curve=curve,
    )


def _seconds_of_children() -> float:
    """What all processes that this one has waited for have used, of all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _import_toolbox(scope: str) -> None:
    for part in ('datasets', 'evaluation', 'models', 'visualization'):
        importlib.import_module(f'{scope}.{part}')


def _run_script(line: Sequence[str], log: Path) -> None:
    """Runs a script of this repository, all that it prints in a file."""
    _end_with_parent()
    # Of this process and of those that it starts.
    sys.stdout = sys.stderr = log.open('w', buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    sys.argv = list(line)
    runpy.run_path(str(ROOT / line[0]), run_name='__main__')


def _end_with_parent() -> None:
    """Lets a forked process end when the one that forked it does, even if killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def last_checkpoint(work_dir: Path) -> Optional[Path]:
    """The weights that a training in this folder ended with, if it did."""
    path = work_dir / 'last_checkpoint'
    if not path.is_file():
        return None
    checkpoint = Path(path.read_text().strip())
    return checkpoint if checkpoint.is_file() else None


class Results:
    """The rows of a study, in a CSV file.

    Args:
        path (Path): The file. Rows that are in it are read.
        key (Sequence[str]): The columns that name a row.
        values (Sequence[str]): The other columns.
        check (Callable[[dict[str, str]], None], optional): Raises a ValueError for a
            row that has something else than it should. Defaults to none.

    Raises:
        ValueError: If the file has other columns, or rows that are not whole.
    """

    def __init__(
        self,
        path: Path,
        key: Sequence[str],
        values: Sequence[str],
        check: Optional[Callable[[dict[str, str]], None]] = None,
    ) -> None:
        self.path = path
        self.key = tuple(key)
        self.fields = (*key, *values)
        self.check = check or (lambda row: None)
        self.rows: list[dict[str, str]] = []
        self._read()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        try:
            lines = self.path.read_text().splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"'{self.path}' is not text in UTF-8: {error}") from error
        reader = csv.reader(lines)
        found = tuple(next(reader, ()))
        if found != self.fields:
            raise ValueError(
                f"'{self.path}' has the columns {list(found)}, not those of this "
                f'study, {list(self.fields)}: it is of another study or version'
            )
        rows = [dict(zip(self.fields, cells)) for cells in reader]
        for number, row in enumerate(rows, 2):
            try:
                if len(row) < len(self.fields) or not lines[number - 1].endswith('\n'):
                    raise ValueError('it is not whole')
                self.check(row)
            except ValueError as error:
                raise ValueError(
                    f"'{self.path}', line {number}: {error}; remove this line"
                ) from error
        self.rows = rows

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing, with the rows that there are by then.

        Raises:
            OutputError: If another process does so.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / '.lock'
        try:
            with FileLock(path).acquire(timeout=0):
                try:
                    self._read()
                    yield
                finally:
                    path.unlink(missing_ok=True)
        except Timeout as error:
            raise OutputError(
                f"another process works in '{folder}'; wait for it, or choose another "
                'folder'
            ) from error

    def get(self, key: Mapping[str, str]) -> Optional[dict[str, str]]:
        """The row of this key, if there is one."""
        wanted = self._key_of(key)
        return next((row for row in self.rows if self._key_of(row) == wanted), None)

    def merge(self, *paths: Path) -> None:
        """Takes the rows of other files that are not here, and says how many.

        Args:
            *paths (Path): The files. All are read before anything is written.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one has other columns, or rows that are not whole.
        """
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no results at '{path}'")
        values = self.fields[len(self.key) :]
        files = {p: Results(p, self.key, values, self.check).rows for p in paths}
        with self.locked():
            for path, rows in files.items():
                known = {self._key_of(row): row for row in self.rows}
                new = {self._key_of(row): row for row in rows}
                differ = sum(row != known.get(key, row) for key, row in new.items())
                new = {key: row for key, row in new.items() if key not in known}
                self.add(*new.values())
                print(f"{len(new)} rows are new in '{path}'.")
                if differ:
                    print(f'{differ} others have other values than here, which stay.')

    def require_rows(self) -> None:
        """Raises a ValueError if there are none."""
        if not self.rows:
            raise ValueError(f"no rows in '{self.path}'; run without --report-only")

    def add(self, *rows: Mapping[str, str]) -> None:
        """Appends rows, and writes the file."""
        self.rows += [{name: row[name] for name in self.fields} for row in rows]
        with atomic_write(self.path) as path, path.open('w', newline='') as file:
            writer = csv.DictWriter(file, self.fields, lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.rows)

    def _key_of(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in self.key)


class Job(NamedTuple):
    """What gives one row.

    Args:
        key (dict[str, str]): The columns that name the row.
        run (Callable[[], dict[str, str]]): Gives the other columns.
    """

    key: dict[str, str]
    run: Callable[[], dict[str, str]]


def run_jobs(
    jobs: Sequence[Job],
    results: Results,
    processes: int = 1,
    shown: Optional[Sequence[str]] = None,
) -> list[str]:
    """Runs the jobs that have no row yet, and says how long the rest will take.

    Args:
        jobs (Sequence[Job]): In the order in which they begin.
        results (Results): Gets the rows.
        processes (int): How many run side by side. Defaults to 1.
        shown (Sequence[str], optional): The columns to print beside the key. Defaults
            to all.

    Returns:
        list[str]: A line for each job that failed; the others ran.

    Raises:
        OutputError: If another process works in the same folder.
    """
    with results.locked():
        try:
            return _run_jobs(jobs, results, processes, shown)
        except KeyboardInterrupt:
            sys.exit('Stopped. The same line goes on with the jobs that had not ended.')


def _run_jobs(
    jobs: Sequence[Job],
    results: Results,
    processes: int,
    shown: Optional[Sequence[str]],
) -> list[str]:
    left = [job for job in jobs if results.get(job.key) is None]
    began = time.perf_counter()
    failures = []
    print(f'{len(left)} of {len(jobs)} jobs to do.', flush=True)
    for i, (job, values) in enumerate(_outcomes(left, processes), 1):
        text = ', '.join(f'{name} {value}' for name, value in job.key.items())
        if isinstance(values, Exception):
            failures.append(f'{text}: {values}')
            text += ', FAILED'
        else:
            results.add({**job.key, **values})
            found = [f'{k} {v}' for k, v in values.items() if k in (shown or values)]
            text = ', '.join([text, *found])
        # Those that run are half done, by and large.
        done = i + min(processes - 1, len(left) - i) / 2
        minutes = (time.perf_counter() - began) / 60 * (len(left) - done) / done
        print(f'{i} of {len(left)}: {text}. About {minutes:.0f} min left', flush=True)
    return failures


def raise_failures(failures: Sequence[str]) -> None:
    """Raises at the end of a study of which some jobs failed.

    Args:
        failures (Sequence[str]): What :func:`run_jobs` returned.

    Raises:
        ValueError: With all of them, if there are any.
    """
    if failures:
        raise ValueError(
            f'{len(failures)} jobs failed, run the same line again to repeat them: '
            + '; '.join(failures)
        )


def report_and_raise(
    results: Results, failures: Sequence[str], report: Callable[[], None]
) -> None:
    """Ends a study: reports the rows that there are, then raises what went wrong.

    Args:
        results (Results): The rows.
        failures (Sequence[str]): What :func:`run_jobs` returned.
        report (Callable[[], None]): Writes tables and figures.

    Raises:
        ValueError: If jobs failed, whatever the report raises, or if there are no rows.
    """
    try:
        if results.rows:
            report()
    finally:
        raise_failures(failures)
    results.require_rows()


_Outcome = tuple[Job, Union[dict[str, str], Exception]]


def _outcomes(jobs: Sequence[Job], processes: int) -> Iterator[_Outcome]:
    """What each job gives, in the order in which they end."""
    if processes > 1:
        yield from _outcomes_side_by_side(jobs, processes)
        return
    for job in jobs:
        try:
            yield job, job.run()
        except Exception as error:
            yield job, error


def _outcomes_side_by_side(jobs: Sequence[Job], processes: int) -> Iterator[_Outcome]:
    context = multiprocessing.get_context('fork')
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                receiver, sender = context.Pipe(duplex=False)
                job = waiting.pop(0)
                process = context.Process(target=_run_and_send, args=(job, sender))
                process.start()
                sender.close()  # So that the end of the process is that of the pipe.
                running[receiver] = job, process
            for receiver in wait(list(running)):
                job, process = running.pop(receiver)
                try:
                    values = receiver.recv()
                except EOFError:
                    values = RuntimeError('its process was killed')
                process.join()
                yield job, values
    finally:
        for _, process in running.values():
            process.kill()


def _run_and_send(job: Job, sender: Connection) -> None:
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # That is for the parent to take.
    try:
        sender.send(job.run())
    except Exception as error:
        sender.send(RuntimeError(str(error)))
