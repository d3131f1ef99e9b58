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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from scipy import stats

from mmorepa.cli import positive
from mmorepa.utils.errors import OutputError
from mmorepa.utils.files import atomic_write, check_outputs

ROOT = Path(__file__).resolve().parents[2]
# Markdown tables, and figures with their captions, by name.
Report = tuple[dict[str, str], dict[str, tuple[plt.Figure, str]]]


def study_parser(
    description: str, name: str, jobs: str = '', **options
) -> argparse.ArgumentParser:
    """A parser with the arguments of every study.

    Args:
        description (str): What the study measures.
        name (str): The name of its folder below ``work_dirs``.
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
    """The rows of a study, in a CSV file.

    Args:
        path (Path): The file. Rows that are in it are read, as text.
        key (Sequence[str]): The columns that name a row.
        values (Sequence[str]): The other columns.
        check (Callable[[dict], None], optional): Raises a ValueError for a bad row.
            Defaults to none.

    Raises:
        ValueError: If the file has other columns, or bad rows.
    """

    def __init__(
        self,
        path: Path,
        key: Sequence[str],
        values: Sequence[str],
        check: Optional[Callable[[dict[str, str]], None]] = None,
    ) -> None:
        self.path, self.key, self.fields = path, [*key], [*key, *values]
        self.check = check
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
        for number, row in enumerate(rows.to_dict('records') if self.check else (), 2):
            try:
                self.check(row)
            except ValueError as error:
                raise ValueError(
                    f"'{path}', line {number}: {error}; remove this line"
                ) from error
        return rows

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing; takes the rows that they have written.

        Raises:
            OutputError: If another process writes.
        """
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

        Args:
            *paths (Path): The files. All are read before anything is written.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one has other columns, or bad rows.
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
    """What gives one row.

    Args:
        key (dict[str, str]): The columns that name the row.
        run (Callable[[], dict[str, str]]): Gives the other columns; it can be pickled.
    """

    key: dict[str, str]
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


def run_jobs(
    jobs: Sequence[Job],
    results: Results,
    processes: int = 1,
    shown: Optional[Sequence[str]] = None,
) -> list[str]:
    """Runs the jobs that have no row yet, in processes, and tells the progress.

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
                job = futures[future]
                text = ', '.join(f'{name} {value}' for name, value in job.key.items())
                if error := future.exception():
                    failures.append(f'{text}: {error}')
                    text += ', FAILED'
                else:
                    values = future.result()
                    results.add({**job.key, **values})
                    told = (f'{k} {values[k]}' for k in shown or values)
                    text = ', '.join([text, *told])
                # Those that run are half done, by and large.
                ended = i + min(processes - 1, len(left) - i) / 2
                minutes = (time.perf_counter() - began) / 60 * (len(left) / ended - 1)
                print(f'{i} of {len(left)}: {text}. About {minutes:.0f} min left')
                sys.stdout.flush()
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
    figures: Sequence[str],
    inputs: Sequence[Path] = (),
    shown: Optional[Sequence[str]] = None,
) -> None:
    """Runs the jobs that have no row, and reports all rows, also where jobs failed.

    Args:
        args (argparse.Namespace): Of :func:`study_parser`; with ``merge``, the rows of
            these files are taken first.
        results (Results): The rows.
        make_jobs (Callable[[], Sequence[Job]]): Checks the data, and gives the jobs.
        report (Callable[[pd.DataFrame], Report]): Makes tables and figures of rows.
        figures (Sequence[str]): The names of all figures that it may make.
        inputs (Sequence[Path]): Files that are read, and so not to be overwritten.
            Defaults to none.
        shown (Sequence[str], optional): See :func:`run_jobs`.

    Raises:
        ValueError: If jobs failed, there are no rows, or the document lacks a comment.
    """
    names = ('results.csv', 'tables.md', *(f'{name}.png' for name in figures))
    check_outputs([*(args.out / name for name in names), args.document], inputs)
    if args.document:
        read_document(args.document)  # Before hours of work, not after.
    if getattr(args, 'merge', ()):
        results.merge(*args.merge)
    failures = []
    if not args.report_only:
        failures = run_jobs(make_jobs(), results, args.jobs, shown)
    try:
        if len(results.rows):
            write_report(report(results.rows), args.out, args.document)
    finally:
        if failures:
            raise ValueError(
                f'{len(failures)} jobs failed, run the same line again to repeat them: '
                + '; '.join(failures)
            )
    if results.rows.empty:
        raise ValueError(f"no rows in '{results.path}'; run without --report-only")


class Difference(NamedTuple):
    """A mean of differences of pairs, with its 95 % confidence interval.

    Args:
        mean (float): The mean.
        reach (float): Half of the interval, NaN for a single pair.
        pairs (int): The number of pairs.
    """

    mean: float
    reach: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs < 2:
            return f'{self.mean:+.2f}'
        low, high = self.mean - self.reach, self.mean + self.reach
        return f'{self.mean:+.2f} [{low:+.2f}, {high:+.2f}]'


def paired_difference(values: pd.Series, reference: pd.Series) -> Optional[Difference]:
    """The mean of ``values - reference`` over the seeds of both, by Student's t.

    Args:
        values (pd.Series): By seed; NaN, of a training that diverged, is left out.
        reference (pd.Series): By seed.

    Returns:
        Difference, optional: None where they share no seed.
    """
    each, reach = (values - reference).dropna(), float('nan')
    if len(each) > 1:
        reach = each.sem() * stats.t.ppf(0.975, len(each) - 1)
    return Difference(each.mean(), reach, len(each)) if len(each) else None


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


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table, its first column flush left and the others right; empty without rows."""
    if not rows:
        return ''
    lines = [rows[0], ['---', *['--:'] * (len(rows[0]) - 1)]]
    lines += [row.values() for row in rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def read_document(path: Path) -> str:
    """The text of a Markdown file whose comments come in pairs.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the beginning or the end of a part is missing, or there twice.
    """
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
    """Replaces what is between the comments of each part.

    Args:
        path (Path): A Markdown file.
        parts (Mapping[str, str]): Tables and figures, by name.

    Returns:
        list[str]: The names of those that have no place in it.

    Raises:
        FileNotFoundError, ValueError: See :func:`read_document`.
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


def write_report(report: Report, out: Path, document: Optional[Path] = None) -> None:
    """Prints the tables of a study, if there are any, and writes them and figures.

    Args:
        report (Report): Tables and figures. Figures are closed.
        out (Path): The folder for figures, and for ``tables.md`` without a document.
        document (Path, optional): See :func:`fill_document`. Defaults to none.
    """
    tables, figures = report
    if not tables:
        return
    text = '\n\n'.join(f'### {name}\n\n{table}' for name, table in tables.items())
    print(f'{text}\n')
    images = {}
    for name, (figure, caption) in figures.items():
        path = out / f'{name}.png'
        save(figure, path)
        if document:
            images[name] = f'![{caption}]({os.path.relpath(path, document.parent)})'
    if document is None:
        with atomic_write(out / 'tables.md') as file:
            file.write_text(text + '\n')
    elif without := fill_document(document, {**tables, **images}):
        print(f"'{document}' has no place for: {', '.join(without)}.")
    print(f"Wrote tables to '{document or out / 'tables.md'}', figures to '{out}'.")


def panels(
    lines: int, columns: int, width: float, height: float, **options
) -> tuple[plt.Figure, np.ndarray]:
    """A figure of so many inches, and its axes in an array of two dimensions."""
    return plt.subplots(
        lines,
        columns,
        figsize=(width, height),
        layout='constrained',
        squeeze=False,
        **options,
    )


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a PNG, and closes the figure."""
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


class Line(NamedTuple):
    """One line of a figure of differences.

    Args:
        text (str): Its name.
        colour (str): The colour of its marks.
        values (pd.Series): By seed.
        reference (pd.Series): What is subtracted from them.
        is_filled (bool): Whether its mark is filled. Defaults to True.
    """

    text: str
    colour: str
    values: pd.Series
    reference: pd.Series
    is_filled: bool = True


def draw_differences(axes: plt.Axes, lines: Sequence[Line]) -> None:
    """From top to bottom: each seed, and the mean with its interval.

    Lines without a pair are left out.
    """
    texts, pairs = [], (paired_difference(x.values, x.reference) for x in lines)
    lines = [(line, found) for line, found in zip(lines, pairs) if found]
    for y, (line, found) in enumerate(lines):
        each = (line.values - line.reference).dropna()
        texts.append(f'{line.text} ({found.pairs})')
        axes.scatter(each, [y + 0.22] * len(each), s=9, alpha=0.45, color=line.colour)
        axes.errorbar(
            found.mean,
            y,
            xerr=None if found.pairs < 2 else found.reach,
            fmt='o' if line.is_filled else 's',
            markersize=6,
            capsize=4,
            color=line.colour,
            markerfacecolor=line.colour if line.is_filled else 'white',
        )
    axes.axvline(0, color='black', linewidth=0.9)
    axes.set_yticks(range(len(lines)), texts)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(alpha=0.3, axis='x')
