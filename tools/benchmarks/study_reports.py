"""What experiments of many trainings report: statistics, tables, documents."""

import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from scipy import stats
from studies import Results

from mmorepa.utils.files import atomic_write


def write_report(
    results: Results,
    to_markdown: Callable[[Results], str],
    plot: Callable[[Results, Path], None],
) -> None:
    """Writes the tables and the figure of a study beside its rows.

    Args:
        results (Results): The rows.
        to_markdown (Callable[[Results], str]): Makes the tables.
        plot (Callable[[Results, Path], None]): Draws the figure into a file.

    Raises:
        ValueError: If there are no rows.
    """
    results.require_rows()
    tables = to_markdown(results)
    with atomic_write(results.path.with_suffix('.md')) as file:
        file.write_text(tables + '\n')
    plot(results, results.path.with_suffix('.png'))
    print(f'{tables}\n\nWrote results.md and results.png beside {results.path}.')


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
        values (Mapping[str, float]): By seed; NaN, of a training that diverged, is left
            out.
        reference (Mapping[str, float]): By seed.
        confidence (float): Of the interval. Defaults to 0.95.

    Returns:
        Difference, optional: None where they share nothing.
    """
    values, reference = finite(values), finite(reference)
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


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those that are numbers: of trainings that did not diverge."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def mean_and_deviation(values: Sequence[float]) -> str:
    """``mean ± deviation``, as for a sample; those that diverged are counted apart."""
    found = [value for value in values if math.isfinite(value)]
    texts = []
    if found:
        texts.append(f'{statistics.fmean(found):.2f}')
    if len(found) > 1:
        texts.append(f'± {statistics.stdev(found):.2f}')
    if len(found) < len(values):
        texts.append(f'({len(values) - len(found)} diverged)')
    return ' '.join(texts)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column flush left and the others right."""
    lines = [headers, ['---', *['--:'] * (len(headers) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def check_document(path: Optional[Path]) -> None:
    """Raises before hours of training, not after.

    Args:
        path (Path, optional): See :func:`fill_document`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a comment is there twice, or its end is missing.
    """
    if path is None:
        return
    if not path.is_file():
        raise FileNotFoundError(f"there is no document '{path}'")
    text = path.read_text()
    for name in re.findall('<!-- (?:begin|end) (.+?) -->', text):
        begin, end = _places(name)
        counts = text.count(begin), text.count(end)
        if counts != (1, 1) or text.index(end) < text.index(begin):
            raise ValueError(f"'{path}' needs one '{begin}' and then one '{end}'")


def _places(name: str) -> tuple[str, str]:
    return f'<!-- begin {name} -->', f'<!-- end {name} -->'


def fill_document(path: Path, parts: Mapping[str, str]) -> list[str]:
    """Replaces what is between the comments of each part.

    Args:
        path (Path): A Markdown file.
        parts (Mapping[str, str]): Tables and figures, by name.

    Returns:
        list[str]: The names of those that have no place in it.

    Raises:
        FileNotFoundError, ValueError: See :func:`check_document`.
    """
    check_document(path)
    text = path.read_text()
    without = []
    for name, part in parts.items():
        begin, end = _places(name)
        if begin not in text:
            without.append(name)
            continue
        before, rest = text.split(begin)
        text = f'{before}{begin}\n\n{part}\n\n{end}{rest.split(end)[1]}'
    with atomic_write(path) as file:
        file.write_text(text)
    return without


def write_tables(
    tables: Mapping[str, str],
    figures: Mapping[str, tuple[Path, str]],
    path: Path,
    document: Optional[Path] = None,
) -> None:
    """Prints the tables of a study, and writes them.

    Args:
        tables (Mapping[str, str]): By name.
        figures (Mapping[str, tuple[Path, str]]): Files and captions, by name.
        path (Path): The file for the tables alone.
        document (Path, optional): See :func:`fill_document`; it gets tables and
            figures, and the file is not written.
    """
    text = '\n\n'.join(f'### {name}\n\n{table}' for name, table in tables.items())
    print(f'{text}\n')
    if document is None:
        with atomic_write(path) as file:
            file.write_text(text + '\n')
        return
    images = {
        name: f'![{caption}]({os.path.relpath(figure, document.parent)})'
        for name, (figure, caption) in figures.items()
    }
    without = fill_document(document, {**tables, **images})
    if without:
        print(f"'{document}' has no place for: {', '.join(without)}.")
