"""Tables and figures of the accuracy study."""

import argparse
import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from accuracy_runs import (
    ABLATIONS,
    BLOCKS,
    DATA,
    DECAYS,
    FACTORS,
    KEY,
    LONGER,
    NETWORKS,
    REFERENCE,
    STANDARD,
    VARIANTS,
    curve_of,
    standard_epochs,
    training_seconds,
)
from studies import Results
from study_reports import (
    Difference,
    finite,
    markdown_table,
    mean_and_deviation,
    paired_difference,
    write_tables,
)

from mmorepa.utils.files import atomic_write
from mmorepa.utils.tables import counted

# By seed.
Rows = dict[str, dict[str, str]]


class Study:
    """The rows of one data set, by what they are compared by.

    Args:
        results (Results): The rows.
        data (str): A key of :data:`DATA`.
        epochs (int, optional): Of the standard variant; None is what the config says.
    """

    def __init__(
        self, results: Results, data: str, epochs: Optional[int] = None
    ) -> None:
        epochs = standard_epochs(data, epochs)
        self.data = data
        self.rows = [
            row
            for row in results.rows
            if row['data'] == data
            and row['variant'] in VARIANTS
            and int(row['epochs']) == VARIANTS[row['variant']].epochs(epochs)
        ]

    def of(
        self, network: str, block: str, variant: str = STANDARD, factor: str = '1'
    ) -> Rows:
        """Rows by seed."""
        wanted = (network, block, variant, factor)
        names = KEY[1:5]
        return {
            row['seed']: row
            for row in self.rows
            if tuple(row[name] for name in names) == wanted
        }

    def best_factor(self, network: str, block: str) -> Optional[str]:
        """The learning rate of the highest mean over the seeds that all of them have.

        None if there are no such seeds. A training that diverged is the worst of all.
        """
        found = {f: accuracies(self.of(network, block, factor=f)) for f in FACTORS}
        seeds = set.intersection(*map(set, found.values()))
        means = {
            factor: statistics.fmean(
                values[s] if math.isfinite(values[s]) else -math.inf for s in seeds
            )
            for factor, values in found.items()
            if seeds
        }
        return max(means, key=means.get, default=None)


def accuracies(rows: Rows) -> dict[str, float]:
    """By seed; NaN for a training that diverged."""
    return {seed: float(row['accuracy']) for seed, row in rows.items()}


def relative_times(rows: Rows, reference: Rows) -> list[float]:
    """Ratios of training time, of those seeds that are of one device."""
    return [
        training_seconds(row) / training_seconds(reference[seed])
        for seed, row in rows.items()
        if seed in reference and row['device'] == reference[seed]['device']
    ]


def _time_cell(
    rows: Rows,
    reference: Rows,
    factor: Fraction = Fraction(1),
) -> str:
    if rows == reference:
        return f'{float(factor):.2f}' if rows else ''
    return mean_and_deviation([x * factor for x in relative_times(rows, reference)])


def _difference(rows: Rows, reference: Rows) -> Optional[Difference]:
    return paired_difference(accuracies(rows), accuracies(reference))


def _difference_cell(
    rows: Rows,
    reference: Rows,
    beside: Optional[Rows] = None,
) -> str:
    """With the number of pairs, if it is not that of the rows it stands beside."""
    found = _difference(rows, reference)
    if found is None or rows == reference:
        return ''
    seeds = len(rows if beside is None else beside)
    pairs = '' if found.pairs == seeds else f' ({counted(found.pairs, "pair")})'
    return f'{found}{pairs}'


def _names(network: str, block: str) -> str:
    return f'{NETWORKS[network]}, {BLOCKS[network][block]}'


def _blocks() -> Iterator[tuple[str, str]]:
    for network, blocks in BLOCKS.items():
        for block in blocks:
            yield network, block


def main_table(study: Study) -> Optional[str]:
    """One recipe for all, that of the plain network."""
    rows = []
    for network, block in _blocks():
        found, plain = study.of(network, block), study.of(network, REFERENCE)
        if found:
            rows.append(
                (
                    _names(network, block),
                    mean_and_deviation([*accuracies(found).values()]),
                    _difference_cell(found, plain),
                    _difference_cell(study.of(network, 'orepa'), found, beside=found),
                    _time_cell(found, plain),
                    f'{int(next(iter(found.values()))["deployed_parameters"]):,}',
                    str(len(found)),
                )
            )
    headers = ('', 'top-1 accuracy (%)', 'minus plain', 'OREPA minus this')
    headers = (*headers, 'training time / plain', 'deployed parameters', 'seeds')
    return markdown_table(headers, rows) if rows else None


def rates_table(study: Study) -> Optional[str]:
    """Each block's best learning rate, with the number of seeds of each."""
    rows = []
    for network, block in _blocks():
        best = study.best_factor(network, block)
        if best is None:
            continue
        cells = []
        for factor in FACTORS:
            values = accuracies(study.of(network, block, factor=factor)).values()
            text = mean_and_deviation([*values])
            text = f'**{text}**' if factor == best else text
            cells.append(f'{text}, {len(values)}')
        plain_best = study.best_factor(network, REFERENCE)
        difference = ''
        if block != REFERENCE and plain_best is not None:
            difference = _difference_cell(
                study.of(network, block, factor=best),
                study.of(network, REFERENCE, factor=plain_best),
            )
        rows.append((_names(network, block), *cells, difference))
    rates = [f'learning rate x {factor}' for factor in FACTORS]
    headers = ('top-1 accuracy (%), seeds', *rates, 'best minus best plain')
    return markdown_table(headers, rows) if rows else None


def variants_table(study: Study, names: Sequence[str]) -> Optional[str]:
    """Blocks with each of these changes, beside the whole and the plain network."""
    network, rows = 'resnet18', []
    plain, orepa = study.of(network, REFERENCE), study.of(network, 'orepa')
    for block, text in BLOCKS[network].items():
        whole = study.of(network, block)
        changed = {VARIANTS[n].text: study.of(network, block, n) for n in names}
        changed = {text: found for text, found in changed.items() if found}
        if whole and changed:
            for change, found in {'': whole, **changed}.items():
                rows.append(
                    (
                        f'{text}, {change}' if change else text,
                        mean_and_deviation([*accuracies(found).values()]),
                        _difference_cell(found, whole),
                        _difference_cell(found, plain),
                        ''
                        if block == 'orepa'
                        else _difference_cell(orepa, found, beside=found),
                        str(len(found)),
                    )
                )
    headers = ('slim ResNet-18', 'top-1 accuracy (%)', 'minus unchanged', 'minus plain')
    headers = (*headers, 'OREPA minus this', 'seeds')
    return markdown_table(headers, rows) if rows else None


def budget_table(study: Study) -> Optional[str]:
    """OREPA beside trainings that take longer than it, or as long."""
    rows = []
    for network, blocks in BLOCKS.items():
        orepa, plain = study.of(network, 'orepa'), study.of(network, REFERENCE)
        has_longer = {
            block: any(study.of(network, block, name) for name in LONGER)
            for block in blocks
        }
        for block in blocks:
            for name in (STANDARD, *LONGER) if any(has_longer.values()) else ():
                found = study.of(network, block, name)
                is_orepa = (block, name) == ('orepa', STANDARD)
                if not found or not (has_longer[block] or is_orepa):
                    continue
                epochs = next(iter(found.values()))['epochs']
                # An epoch takes as long, however many there are.
                standard = study.of(network, block)
                rows.append(
                    (
                        f'{_names(network, block)}, {epochs} epochs',
                        mean_and_deviation([*accuracies(found).values()]),
                        _time_cell(standard, plain, VARIANTS[name].length),
                        _difference_cell(found, study.of(network, REFERENCE, name)),
                        _difference_cell(orepa, found, beside=found),
                        str(len(found)),
                    )
                )
    headers = ('', 'top-1 accuracy (%)', 'training time / plain')
    headers = (*headers, 'minus plain of as many epochs', 'standard OREPA minus this')
    headers = (*headers, 'seeds')
    return markdown_table(headers, rows) if rows else None


TABLES: dict[str, Callable[[Study], Optional[str]]] = dict(
    main=main_table,
    rates=rates_table,
    budget=budget_table,
    ablations=partial(variants_table, names=ABLATIONS),
    decays=partial(variants_table, names=DECAYS),
)


def studies_of(results: Results, epochs: Optional[int] = None) -> dict[str, Study]:
    """By data set."""
    return {data: Study(results, data, epochs) for data in DATA}


def tables_of(studies: dict[str, Study]) -> dict[str, str]:
    """Markdown tables by name, like ``main-10pct``; those without rows are left out."""
    found = {
        f'{name}-{data}': make(study)
        for data, study in studies.items()
        for name, make in TABLES.items()
    }
    return {name: table for name, table in found.items() if table}


class Line(NamedTuple):
    """One line of a figure of differences.

    Args:
        text (str): Its name.
        colour (str): Of its marks.
        rows (dict): By seed.
        reference (dict): What is taken from them.
        is_filled (bool): Whether its mark is.
    """

    text: str
    colour: str
    rows: Rows
    reference: Rows
    is_filled: bool = True


# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = dict(none='#000000', dbb='#E69F00', orepa='#0072B2', repvgg='#009E73')


def block_lines(study: Study) -> list[Line]:
    """Each block beside plain, by one recipe and by the best learning rates."""
    lines = []
    for network, block in _blocks():
        if block == REFERENCE:
            continue
        text = f'{BLOCKS[network][block]}\n{NETWORKS[network]}'
        colour = COLOURS[block]
        rows, plain = study.of(network, block), study.of(network, REFERENCE)
        lines.append(Line(text, colour, rows, plain))
        best = study.best_factor(network, block), study.best_factor(network, REFERENCE)
        if None not in best:
            rows, plain = (
                study.of(network, name, factor=factor)
                for name, factor in zip((block, REFERENCE), best)
            )
            text = f'{BLOCKS[network][block]}, best rates\n{NETWORKS[network]}'
            lines.append(Line(text, colour, rows, plain, False))
    return [line for line in lines if _difference(line.rows, line.reference)]


def ablation_lines(study: Study) -> list[Line]:
    """Each ablation beside the whole."""
    whole = study.of('resnet18', 'orepa')
    lines = [
        Line(
            VARIANTS[name].text, 'tab:blue', study.of('resnet18', 'orepa', name), whole
        )
        for name in ABLATIONS
    ]
    plain = study.of('resnet18', REFERENCE)
    lines = [Line('the plain network', 'black', plain, whole), *lines]
    lines = [line for line in lines if _difference(line.rows, line.reference)]
    return lines if len(lines) > 1 else []


def draw_differences(axes: plt.Axes, lines: Sequence[Line]) -> None:
    """From top to bottom: each seed, and the mean with its interval."""
    texts = []
    for y, line in enumerate(lines):
        values, reference = map(finite, map(accuracies, (line.rows, line.reference)))
        found = paired_difference(values, reference)
        texts.append(f'{line.text} ({found.pairs})')
        each = [values[seed] - reference[seed] for seed in values if seed in reference]
        axes.scatter(each, [y + 0.22] * len(each), s=9, alpha=0.45, color=line.colour)
        reach = None if found.pairs < 2 else found.high - found.mean
        axes.errorbar(
            found.mean,
            y,
            xerr=reach,
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


def plot_differences(
    studies: dict[str, Study],
    make: Callable[[Study], list[Line]],
    label: str,
    title: str,
    path: Path,
) -> bool:
    """A panel for each data set that has something to draw; whether there is one."""
    panels = {data: make(study) for data, study in studies.items()}
    panels = {data: lines for data, lines in panels.items() if lines}
    if not panels:
        return False
    height = 1.6 + 0.36 * max(map(len, panels.values()))
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(6.5, 5.2 * len(panels)), height),
        layout='constrained',
        squeeze=False,
        sharex=True,
    )
    for axes, (data, lines) in zip(all_axes[0], panels.items()):
        draw_differences(axes, lines)
        axes.set(title=DATA[data], xlabel=f'{label}\n← worse          better →')
    width = 70 * len(panels)
    figure.suptitle(textwrap.fill(title, width), fontsize='medium')
    _save(figure, path)
    return True


# Times plain's training, on the figure of the budget.
MOST_TIME = 2.5


def plot_budget(studies: dict[str, Study], path: Path) -> bool:
    """A curve of accuracy over seconds for each block; whether there is one."""
    panels = [
        [(network, study) for network in NETWORKS if study.of(network, REFERENCE)]
        for study in studies.values()
    ]
    panels = [row for row in panels if row]
    if not panels:
        return False
    columns = max(map(len, panels))
    figure, all_axes = plt.subplots(
        len(panels),
        columns,
        figsize=(max(6.5, 5.2 * columns), 0.5 + 3.6 * len(panels)),
        layout='constrained',
        squeeze=False,
    )
    for axes in all_axes.flat:
        axes.set_visible(False)
    for row, row_of_axes in zip(panels, all_axes):
        for (network, study), axes in zip(row, row_of_axes):
            axes.set_visible(True)
            _draw_budget(axes, study, network)
    title = (
        'Accuracy for the time spent: mean and standard deviation of the seeds, whose '
    )
    title += 'number is in brackets.\nDotted: where plain ends.'
    if any(
        row['variant'] in LONGER for study in studies.values() for row in study.rows
    ):
        title += ' Rings: trainings of more epochs.'
    figure.suptitle(title, fontsize='medium')
    _save(figure, path)
    return True


def _mean_curve(rows: Sequence[dict[str, str]]) -> tuple[list, list, list]:
    """Seconds, accuracies and deviations, means over rows of the same epochs."""
    xs, means, deviations = [], [], []
    for points in zip(*map(curve_of, rows)):
        values = [point.metric for point in points]
        xs.append(statistics.fmean(map(training_seconds, rows, points)))
        means.append(statistics.fmean(values))
        deviations.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    return xs, means, deviations


def _draw_ring(
    axes: plt.Axes, rows: Sequence[dict[str, str]], seconds: float, colour: str
) -> float:
    """Where trainings of more epochs end; returns their mean accuracy."""
    _, means, deviations = _mean_curve(rows)
    style = dict(fmt='o', markersize=8, markerfacecolor='none', capsize=3)
    axes.errorbar(seconds, means[-1], deviations[-1], color=colour, **style)
    axes.annotate(
        f'{rows[0]["epochs"]} epochs ({len(rows)})',
        (seconds, means[-1]),
        xytext=(-7, 5),
        textcoords='offset points',
        ha='right',
        color=colour,
        fontsize='small',
    )
    return means[-1]


def _draw_budget(axes: plt.Axes, study: Study, network: str) -> None:
    ends, plain_end = [], math.inf
    device = next(iter(study.of(network, REFERENCE).values()))['device']

    def of(block: str, variant: str = STANDARD) -> list[dict[str, str]]:
        """Those whose seconds can be compared."""
        found = study.of(network, block, variant)
        seeds = finite(accuracies(found))
        return [found[seed] for seed in seeds if found[seed]['device'] == device]

    for block, text in BLOCKS[network].items():
        colour, rows = COLOURS[block], of(block)
        if not rows:
            continue
        xs, means, deviations = _mean_curve(rows)
        if block == REFERENCE:
            plain_end = xs[-1]
            axes.axvline(plain_end, color=colour, linestyle=':', linewidth=1)
        label = f'{text} ({len(rows)})'
        if xs[-1] > MOST_TIME * plain_end:
            label += f': {means[-1]:.1f} % after {xs[-1]:.0f} s'
        else:
            ends.append(means[-1])
        axes.plot(xs, means, marker='.', color=colour, label=label)
        axes.plot(xs[-1], means[-1], marker='o', color=colour)
        band = ([m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1))
        axes.fill_between(xs, *band, color=colour, alpha=0.15, linewidth=0)
        for name, length in LONGER.items():
            longer = of(block, name)
            if longer:
                # An epoch takes as long, however many there are.
                seconds = xs[-1] * float(length)
                ends.append(_draw_ring(axes, longer, seconds, colour))
    # The first epochs would take all of the height.
    reach = max(max(ends, default=0) - min(ends, default=0), 1.0)
    axes.set_ylim(min(ends, default=0) - 2 * reach, max(ends, default=0) + 0.8 * reach)
    # A curve of several times the others' length would squeeze them together.
    axes.set_xlim(0, min(axes.get_xlim()[1], MOST_TIME * plain_end))
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    unit = ', of one core' if device == 'cpu' else f' on a shared {device}'
    axes.set(
        title=f'{NETWORKS[network]}, {DATA[study.data]}',
        xlabel=f'seconds of training{unit}',
        ylabel='top-1 accuracy (%)',
    )


def _save(figure: plt.Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


FIGURES = dict(
    differences='Differences to plain, seed by seed, with their means and intervals',
    ablations='Differences to OREPA without its parts, or changed',
    budget='Accuracy over seconds of training',
)


def report(results: Results, args: argparse.Namespace) -> None:
    """Writes tables and figures of all rows."""
    studies = studies_of(results, args.epochs)
    shown = sum(len(study.rows) for study in studies.values())
    if not shown:
        found = sorted({row['epochs'] for row in results.rows}, key=int)
        raise ValueError(
            f"no row of '{results.path}' is of the configs' number of epochs, or of "
            f'--epochs; found trainings of {", ".join(found)}'
        )
    if shown < len(results.rows):
        print(
            f'Left out: {len(results.rows) - shown} rows of other numbers of epochs, '
            'or of variants that are not known.'
        )
    tables = tables_of(studies)
    if not tables:
        print(
            f"No tables yet: each compares with trainings of '--variants {STANDARD} "
            f"--lr-factors 1', and '{results.path}' has none."
        )
        return
    paths = {name: args.out / f'{name}.png' for name in FIGURES}
    drawn = dict(
        differences=plot_differences(
            studies,
            block_lines,
            'points of accuracy beyond plain',
            'Small dots are seeds, the large mark is their mean, with its 95 % '
            'interval and the number of seeds. Dots: one recipe for all. Squares: the '
            'best of three learning rates for each.',
            paths['differences'],
        ),
        ablations=plot_differences(
            studies,
            ablation_lines,
            'points of accuracy beyond OREPA',
            'OREPA without its parts, or changed: small dots are seeds, the large one '
            'is their mean, with its 95 % interval and the number of seeds',
            paths['ablations'],
        ),
        budget=plot_budget(studies, paths['budget']),
    )
    figures = {name: (paths[name], FIGURES[name]) for name in drawn if drawn[name]}
    write_tables(tables, figures, args.out / 'tables.md', args.document)
    print(f"Wrote tables to '{args.document or args.out}', figures to '{args.out}'.")
