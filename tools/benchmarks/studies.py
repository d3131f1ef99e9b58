"""What experiments of many trainings share: run, resume, record, compare.

A study is a list of jobs. Each trains a config in a process of its own and gives a row
of a CSV file, which is written whole after every job: a study that was killed goes on
with the jobs whose rows are missing.
"""

import csv
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from mmengine.config import Config
from scipy import stats

from mmorepa.utils.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]


class Training(NamedTuple):
    """What a training left.

    Args:
        metric (float): What the last validation measured.
        seconds (float): How long the whole process took.
        checkpoint (Path): The weights after the last epoch.
    """

    metric: float
    seconds: float
    checkpoint: Path


def epochs_options(epochs: int) -> dict:
    """The options that give the recipes of ``configs/`` another length.

    They have a warm-up and then a cosine. The one validation comes after the last epoch
    and the data come from the process itself, so that a training keeps to one core.
    """
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
            for key, value in dict(num_workers=0, persistent_workers=False).items()
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
    file, log = work_dir / 'run.py', work_dir / 'output.log'
    cfg.dump(file)
    _import_toolbox(cfg.default_scope)
    line = ['tools/train.py', str(file), '--work-dir', str(work_dir)]
    # A fork has all that is imported here: imports take longer than a short training.
    process = multiprocessing.get_context('fork').Process(
        target=_run_script, args=(line, log)
    )
    began = time.perf_counter()
    process.start()
    process.join()
    seconds = time.perf_counter() - began
    if process.exitcode:
        *_, last = log.read_text().split('\n')[:-1] or ['no output']
        raise RuntimeError(f'a training of {config.name} failed ({log}): {last}')
    return Training(_last_value(work_dir, metric), seconds, last_checkpoint(work_dir))


def _import_toolbox(scope: str) -> None:
    for part in ('datasets', 'evaluation', 'models', 'visualization'):
        importlib.import_module(f'{scope}.{part}')


def _run_script(line: Sequence[str], log: Path) -> None:
    """Runs a script of this repository, all that it prints in a file."""
    # Of this process and of those that it starts.
    sys.stdout = sys.stderr = log.open('w', buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    sys.argv = list(line)
    runpy.run_path(str(ROOT / line[0]), run_name='__main__')


def _last_value(work_dir: Path, metric: str) -> float:
    (path,) = work_dir.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [record[metric] for record in records if metric in record]
    if not found:
        raise RuntimeError(f'no {metric!r} was measured, see {path}')
    return found[-1]


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

    Raises:
        ValueError: If the file has other columns.
    """

    def __init__(self, path: Path, key: Sequence[str], values: Sequence[str]) -> None:
        self.path = path
        self.key = tuple(key)
        self.fields = (*key, *values)
        self.rows: list[dict[str, str]] = []
        if not path.is_file():
            return
        with path.open(newline='') as file:
            reader = csv.DictReader(file)
            self.rows = list(reader)
        if tuple(reader.fieldnames or ()) != self.fields:
            raise ValueError(
                f"'{path}' has the columns {reader.fieldnames}, not those of this "
                f'study, {list(self.fields)}; choose another folder'
            )

    def has(self, key: Mapping[str, str]) -> bool:
        """Whether there is a row of this key."""
        return any(self._key_of(row) == self._key_of(key) for row in self.rows)

    def add(self, row: Mapping[str, str]) -> None:
        """Appends a row, and writes the file."""
        self.rows.append({name: row[name] for name in self.fields})
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


def run_jobs(jobs: Sequence[Job], results: Results) -> None:
    """Runs the jobs that have no row yet, and says how long the rest will take."""
    left = [job for job in jobs if not results.has(job.key)]
    began = time.perf_counter()
    print(f'{len(left)} of {len(jobs)} jobs to do.', flush=True)
    for i, job in enumerate(left, 1):
        values = job.run()
        results.add({**job.key, **values})
        minutes = (time.perf_counter() - began) / i * (len(left) - i) / 60
        texts = [*job.key.values(), *(f'{k} {v}' for k, v in values.items())]
        print(
            f'{i} of {len(left)}: {", ".join(texts)}. About {minutes:.0f} min left',
            flush=True,
        )


class Difference(NamedTuple):
    """A mean of differences of pairs, with its confidence interval.

    Args:
        mean (float): The mean.
        low (float): The lower end of the interval, NaN for a single pair.
        high (float): The upper end.
        pairs (int): How many there are.
    """

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs < 2:
            return f'{self.mean:+.2f}'
        return f'{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]'


def paired_difference(
    values: Mapping[str, float],
    reference: Mapping[str, float],
    confidence: float = 0.95,
) -> Optional[Difference]:
    """The mean of ``value - reference`` over what both have, by Student's t.

    Args:
        values (Mapping[str, float]): By seed.
        reference (Mapping[str, float]): By seed.
        confidence (float): Of the interval. Defaults to 0.95.

    Returns:
        Difference, optional: None where they share nothing.
    """
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return Difference(mean, float('nan'), float('nan'), 1)
    error = statistics.stdev(differences) / len(seeds) ** 0.5
    reach = error * stats.t.ppf((1 + confidence) / 2, len(seeds) - 1)
    return Difference(mean, mean - reach, mean + reach, len(seeds))


def mean_and_deviation(values: Sequence[float]) -> str:
    """``mean ± deviation``, as for a sample."""
    mean = f'{statistics.fmean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column flush left and the others right."""
    lines = [headers, ['---', *['--:'] * (len(headers) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
