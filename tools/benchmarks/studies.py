"""What studies share: arguments, rows, jobs, statistics, tables, documents.

A study is a list of jobs, each of which gives a row of a CSV file. The file is written
after every job, so that a study which was stopped goes on with the missing rows.
"""

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from filelock import FileLock
from scipy import stats

sys.path.append(str(Path(__file__).resolve().parents[1] / 'analysis_tools'))
import charts

from mmorepa.cli import positive
from mmorepa.utils.files import atomic_write, check_outputs

ROOT = Path(__file__).resolve().parents[2]
# What names a row, by column, and what gives its other columns.
Key = dict[str, str]
Run = Callable[[Key], dict[str, str]]
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
        help='put the tables into this Markdown file instead of tables.md, '
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
        self.rows = pd.DataFrame(columns=self.fields, dtype=str)
        if path.is_file():
            self.rows = self._read(path)

    def _read(self, path: Path) -> pd.DataFrame:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
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
        with FileLock(self.path.with_name('.lock'), timeout=0):
            if self.path.is_file():
                self.rows = self._read(self.path)
            yield

    def keys(self) -> set[tuple[str, ...]]:
        """The keys of all rows."""
        return {*self.rows[self.key].itertuples(index=False, name=None)}

    def merge(self, paths: Sequence[Path]) -> None:
        """Takes the rows of other files whose keys are not here."""
        others = [self._read(path) for path in paths]
        with self.locked():
            known = len(self.rows)
            every = pd.concat([self.rows, *others]).drop_duplicates()
            self._write(every.drop_duplicates(self.key))
        print(f'{len(self.rows) - known} rows are new.')
        if differ := len(every) - len(self.rows):
            print(f'{differ} others have other values than here, which stay.')

    def add(self, *rows: Mapping[str, str]) -> None:
        """Appends rows, and writes the file."""
        self._write(pd.concat([self.rows, pd.DataFrame(rows, columns=self.fields)]))

    def _write(self, rows: pd.DataFrame) -> None:
        self.rows = rows.reset_index(drop=True)
        with atomic_write(self.path) as file:
            self.rows.to_csv(file, index=False, lineterminator='\n')


def end_with_parent() -> None:
    """Ends a forked process when its parent ends, and by nothing else."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent takes it.
    threading.Thread(target=watch, daemon=True).start()


def _values(run: Run, key: Key) -> dict[str, str]:
    try:
        return run(key)
    except Exception as error:  # Some exceptions cannot be pickled.
        raise RuntimeError(str(error)) from None


def run_jobs(
    keys: Sequence[Key], run: Run, results: Results, processes: int = 1
) -> list[str]:
    """Runs what has no row yet, in processes, and tells the progress.

    Returns a line for each job that failed; the others ran.
    """
    context, failures = multiprocessing.get_context('fork'), []
    with (
        results.locked(),
        ProcessPoolExecutor(processes, context, end_with_parent) as pool,
    ):
        done, began = results.keys(), time.perf_counter()
        left = [key for key in keys if tuple(key.values()) not in done]
        print(f'{len(left)} of {len(keys)} jobs to do.', flush=True)
        futures = {pool.submit(_values, run, key): key for key in left}
        try:
            for i, future in enumerate(as_completed(futures), 1):
                key = futures[future]
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
    make_keys: Callable[[], Sequence[Key]],
    run: Run,
    report: Callable[[pd.DataFrame], Report],
    inputs: Sequence[Path] = (),
) -> None:
    """Runs the jobs that have no row, and reports all rows, also where jobs failed.

    Args:
        args (argparse.Namespace): Of :func:`study_parser`; with ``merge``, the rows of
            these files are taken first.
        results (Results): The rows.
        make_keys (Callable): Checks the data, and gives the keys of all jobs.
        run (Callable): Gives the other columns of a key. It can be pickled.
        report (Callable): Makes tables and figures of rows.
        inputs (Sequence[Path]): Files that must not be overwritten. Defaults to none.
    """
    files = (args.out / 'results.csv', args.out / 'tables.md', args.document)
    check_outputs(files, inputs)
    if args.document:
        args.document.read_text()  # Before hours of work, not after.
    if getattr(args, 'merge', ()):
        results.merge(args.merge)
    failures = []
    if not args.report_only:
        failures = run_jobs(make_keys(), run, results, args.jobs)
    if len(results.rows):
        write_report(*report(results.rows), args)
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
    return differences.sem() * stats.t.ppf(0.975, len(differences) - 1)


def mean_and_interval(differences: pd.Series) -> str:
    """``mean [low, high]`` with signs; the one difference, or nothing without any."""
    if differences.empty:
        return ''
    mean, reach = differences.mean(), reach_of(differences)
    if np.isnan(reach):
        return f'{mean:+.2f}'
    return f'{mean:+.2f} [{mean - reach:+.2f}, {mean + reach:+.2f}]'


def difference(values: pd.Series, reference: pd.Series) -> str:
    """That of the means by seed, as :func:`mean_and_interval` writes it."""
    return mean_and_interval(paired_differences(values, reference))


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


def write_report(
    tables: Mapping[str, str],
    figures: Mapping[str, plt.Figure],
    args: argparse.Namespace,
) -> None:
    """Prints the tables of a study, if there are any, and writes them and figures.

    Without a document, the tables go to ``tables.md`` in the folder of the figures.
    """
    if not tables:
        return
    for name, figure in figures.items():
        charts.save(figure, args.out / f'{name}.png')
    text = '\n\n'.join(f'### {name}\n\n{table}' for name, table in tables.items())
    print(f'{text}\n')
    target = args.document or args.out / 'tables.md'
    with atomic_write(target) as file:
        if args.document:
            file.write_text(fill(target.read_text(), tables))
        else:
            file.write_text(f'{text}\n')
    print(f"Wrote tables to '{target}', figures to '{args.out}'.")


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replaces what is between the comments of each part of a Markdown text."""
    for name, part in parts.items():
        begin, end = f'<!-- begin {name} -->', f'<!-- end {name} -->'
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if found:
            text = f'{before}{begin}\n\n{part}\n\n{end}{after}'
        else:
            print(f'The document has no place for {name}.')
    return text


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
