"""What studies share: arguments, rows, jobs, statistics, tables, documents.

A study is a list of jobs, each of which gives a row of a CSV file. The file is written
after every job, so that a study which was stopped goes on with the missing rows.
"""

import argparse
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from scipy import stats

sys.path.append(str(Path(__file__).resolve().parents[1] / 'analysis_tools'))
from charts import (  # noqa: F401  (for the studies)
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    panels,
    save,
)

from mmorepa.cli import positive
from mmorepa.utils.errors import OutputError
from mmorepa.utils.files import atomic_write, check_outputs

ROOT = Path(__file__).resolve().parents[2]
# Markdown tables, and figures, by name.
Report = tuple[dict[str, str], dict[str, plt.Figure]]


def study_parser(
    description: str, name: str, jobs: str = '', **options
) -> argparse.ArgumentParser:
    """A parser with the arguments of every study.

    Args:
        description (str): What the study measures.
        name (str): Of its folder below ``work_dirs``.
        jobs (str): What runs side by side. Defaults to nothing: one after another.
        **options: Those of ``argparse.ArgumentParser``.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(jobs=1)
    if jobs:
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
        help='the folder for results.csv, tables.md, figures and runs; one process at '
        f'a time works in it (default: work_dirs/{name})',
    )
    parser.add_argument(
        '--document',
        type=Path,
        help='put tables and figures into this Markdown file instead of tables.md, '
        'between its comments <!-- begin NAME --> and <!-- end NAME -->',
    )
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='run nothing; write tables and figures of the rows that are there',
    )
    return parser


class Results:
    """The rows of a study, as text, in a CSV file.

    Args:
        path (Path): The file. Rows that are in it are read.
        key (Sequence[str]): The columns that name a row.
        values (Sequence[str]): The other columns.
    """

    def __init__(self, path: Path, key: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.key, self.fields = path, [*key], [*key, *values]
        self.rows = self._read(path)

    def _read(self, path: Path) -> pd.DataFrame:
        if not path.is_file():
            return pd.DataFrame(columns=self.fields, dtype=str)
        try:
            rows = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
        except ValueError as error:  # Not in UTF-8, or no table.
            raise ValueError(f"'{path}' cannot be read: {error}") from error
        if [*rows] != self.fields:
            raise ValueError(
                f"'{path}' has the columns {[*rows]}, not those of this study, "
                f'{self.fields}: it is of another study or version'
            )
        if not path.read_bytes().endswith(b'\n'):
            raise ValueError(f"'{path}' is not whole: its last line has no end")
        return rows

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing; takes the rows that they have written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name('.lock')
        try:
            with FileLock(lock).acquire(timeout=0):
                try:
                    self.rows = self._read(self.path)
                    yield
                finally:
                    lock.unlink(missing_ok=True)
        except Timeout as error:
            raise OutputError(
                f"another process works in '{self.path.parent}'; wait for it, or "
                'choose another folder'
            ) from error

    def keys(self) -> set[tuple[str, ...]]:
        """The keys of all rows."""
        return {*self.rows[self.key].itertuples(index=False, name=None)}

    def merge(self, *paths: Path) -> None:
        """Takes the rows of other files whose keys are not here, and counts them.

        All files are read before anything is written.
        """
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no results at '{path}'")
        files = {path: self._read(path) for path in paths}
        with self.locked():
            for path, rows in files.items():
                every = pd.concat([self.rows, rows]).drop_duplicates()
                known, merged = len(self.rows), every.drop_duplicates(self.key)
                self._write(merged)
                print(f"{len(merged) - known} rows are new in '{path}'.")
                if differ := len(every) - len(merged):
                    print(f'{differ} others have other values than here, which stay.')

    def add(self, *rows: Mapping[str, str]) -> None:
        """Appends rows, and writes the file."""
        self._write(pd.concat([self.rows, pd.DataFrame(rows, columns=self.fields)]))

    def _write(self, rows: pd.DataFrame) -> None:
        self.rows = rows.reset_index(drop=True)
        with atomic_write(self.path) as file:
            self.rows.to_csv(file, index=False, lineterminator='\n')


class Job(NamedTuple):
    """What gives one row."""

    # The columns that name it.
    key: dict[str, str]
    # Gives the other columns; it can be pickled.
    run: Callable[[], dict[str, str]]


def end_with_parent() -> None:
    """Ends a forked process when its parent ends, even if that is killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin_worker() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent takes it.


def _run(job: Job) -> dict[str, str]:
    try:
        return job.run()
    except Exception as error:  # Some exceptions cannot be pickled.
        raise RuntimeError(str(error)) from None


def run_jobs(jobs: Sequence[Job], results: Results, processes: int = 1) -> list[str]:
    """Runs the jobs that have no row yet, in processes, and tells the progress.

    Returns a line for each job that failed; the others ran.
    """
    context, failures = multiprocessing.get_context('fork'), []
    with (
        results.locked(),
        ProcessPoolExecutor(processes, context, _begin_worker) as pool,
    ):
        done, began = results.keys(), time.perf_counter()
        left = [job for job in jobs if tuple(job.key.values()) not in done]
        print(f'{len(left)} of {len(jobs)} jobs to do.', flush=True)
        futures = {pool.submit(_run, job): job for job in left}
        try:
            for i, future in enumerate(as_completed(futures), 1):
                key = futures[future].key
                text = ', '.join(f'{name} {value}' for name, value in key.items())
                if error := future.exception():
                    failures.append(f'{text}: {error}')
                    text += ', FAILED'
                else:
                    row = {**key, **future.result()}
                    results.add(row)
                    first = results.fields[len(key)]
                    text += f', {first} {row[first]}'
                minutes = (time.perf_counter() - began) / 60 / i * (len(left) - i)
                text += f'. About {minutes:.0f} min left'
                print(f'{i} of {len(left)}: {text}', flush=True)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()
            sys.exit('Stopped. The same line goes on with the jobs that had not ended.')
    return failures


def run_study(
    args: argparse.Namespace,
    results: Results,
    make_jobs: Callable[[], Sequence[Job]],
    report: Callable[[pd.DataFrame], Report],
    captions: Mapping[str, str],
    inputs: Sequence[Path] = (),
) -> None:
    """Runs the jobs that have no row, and reports all rows, also where jobs failed.

    Args:
        args (argparse.Namespace): Of :func:`study_parser`; with ``merge``, the rows of
            these files are taken first.
        results (Results): The rows.
        make_jobs (Callable): Checks the data, and gives the jobs.
        report (Callable): Makes tables and figures of rows.
        captions (Mapping[str, str]): Of all figures that it may make, by name.
        inputs (Sequence[Path]): Files that must not be overwritten. Defaults to none.
    """
    names = ('results.csv', 'tables.md', *(f'{name}.png' for name in captions))
    check_outputs([*(args.out / name for name in names), args.document], inputs)
    if args.document:
        read_document(args.document)  # Before hours of work, not after.
    if getattr(args, 'merge', ()):
        results.merge(*args.merge)
    failures = []
    if not args.report_only:
        failures = run_jobs(make_jobs(), results, args.jobs)
    try:
        if len(results.rows):
            write_report(report(results.rows), captions, args.out, args.document)
    finally:
        if failures:
            raise ValueError(
                f'{len(failures)} jobs failed, run the same line again to repeat them: '
                + '; '.join(failures)
            )
    if results.rows.empty:
        raise ValueError(f"no rows in '{results.path}'; run without --report-only")


def paired_differences(values: pd.Series, reference: pd.Series) -> pd.Series:
    """``values - reference`` by seed, without those that one of them has not.

    A training that diverged is NaN, and left out.
    """
    return (values - reference).dropna()


def reach_of(differences: pd.Series) -> float:
    """Half of the 95 % confidence interval of their mean, by Student's t.

    NaN for a single one.
    """
    pairs = len(differences)
    return differences.sem() * stats.t.ppf(0.975, pairs - 1) if pairs > 1 else np.nan


def mean_and_interval(differences: pd.Series) -> str:
    """``mean [low, high]`` with signs; the one difference, or nothing without any."""
    if differences.empty:
        return ''
    mean, reach = differences.mean(), reach_of(differences)
    if np.isnan(reach):
        return f'{mean:+.2f}'
    return f'{mean:+.2f} [{mean - reach:+.2f}, {mean + reach:+.2f}]'


def mean_and_deviation(values: pd.Series) -> str:
    """``mean ± deviation``, as for a sample; those that diverged are counted apart."""
    count, texts = values.count(), []
    if count:
        texts.append(f'{statistics.fmean(values.dropna()):.2f}')  # Exact.
    if count > 1:
        texts.append(f'± {values.std():.2f}')
    if count < len(values):
        texts.append(f'({len(values) - count} diverged)')
    return ' '.join(texts)


def markdown_table(rows: Iterable[Mapping[str, str]]) -> str:
    """A table, its first column flush left and the others right; empty without rows."""
    rows = [*rows]
    if not rows:
        return ''
    lines = [rows[0], ['---', *['--:'] * (len(rows[0]) - 1)]]
    lines += [row.values() for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def read_document(path: Path) -> str:
    """The text of a Markdown file; raises an error if its comments are no pairs."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no document '{path}'")
    text = path.read_text()
    found = re.findall('<!-- (begin|end) (.+?) -->', text)
    if found[::2] != [('begin', name) for _, name in found[1::2]] or (
        len({*found}) < len(found)
    ):
        raise ValueError(f"'{path}' needs one '<!-- end NAME -->' after each begin")
    return text


def fill_document(path: Path, parts: Mapping[str, str]) -> list[str]:
    """Replaces what is between the comments of each part of a Markdown file.

    Returns the names of those that have no place in it.
    """
    text, without = read_document(path), []
    for name, part in parts.items():
        begin, end = f'<!-- begin {name} -->', f'<!-- end {name} -->'
        if begin not in text:
            without.append(name)
            continue
        before, rest = text.split(begin)
        text = f'{before}{begin}\n\n{part}\n\n{end}{rest.split(end)[1]}'
    with atomic_write(path) as file:
        file.write_text(text)
    return without


def write_report(
    report: Report, captions: Mapping[str, str], out: Path, document: Optional[Path]
) -> None:
    """Prints the tables of a study, if there are any, and writes them and figures.

    Without a document, the tables go to ``tables.md`` in the folder of the figures.
    """
    tables, figures = report
    if not tables:
        return
    text = '\n\n'.join(f'### {name}\n\n{table}' for name, table in tables.items())
    print(f'{text}\n')
    images = {}
    for name, figure in figures.items():
        path = out / f'{name}.png'
        save(figure, path)
        if document:
            place = os.path.relpath(path, document.parent)
            images[name] = f'![{captions[name]}]({place})'
    if document is None:
        with atomic_write(out / 'tables.md') as file:
            file.write_text(text + '\n')
    elif without := fill_document(document, {**tables, **images}):
        print(f"'{document}' has no place for: {', '.join(without)}.")
    print(f"Wrote tables to '{document or out / 'tables.md'}', figures to '{out}'.")


class Line(NamedTuple):
    """One line of a figure of differences, which are by seed."""

    text: str
    colour: str
    differences: pd.Series
    is_filled: bool = True


def draw_differences(axes: plt.Axes, lines: Sequence[Line]) -> None:
    """From top to bottom: each seed, and the mean with its interval."""
    for y, line in enumerate(lines):
        each, colour = line.differences, line.colour
        axes.scatter(each, [y + 0.22] * len(each), s=9, alpha=0.45, color=colour)
        axes.errorbar(
            each.mean(),
            y,
            xerr=reach_of(each),
            fmt='o' if line.is_filled else 's',
            markersize=6,
            capsize=4,
            color=colour,
            markerfacecolor=colour if line.is_filled else 'white',
        )
    texts = [f'{line.text} ({len(line.differences)})' for line in lines]
    axes.axvline(0, color='black', linewidth=0.9)
    axes.set_yticks(range(len(lines)), texts)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(alpha=0.3, axis='x')
