"""Draws the losses and metrics of several trainings in one figure.

A run is the work folder of a training, and names its line. The axes of the metrics are
zoomed to the values of their second half, where runs differ.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'work_dirs/my_config')
    parser.add_argument('runs', nargs='+', type=Path, help='the work folders')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('training_curves.png'),
        help='the PNG to write (default: training_curves.png); its numbers go beside '
        'it, as .csv',
    )
    parser.add_argument(
        '--branches',
        type=Path,
        help='a PNG of what BranchStatisticsHook wrote in the first run',
    )
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import numpy as np
from charts import BLACK, SERIES, VERMILION, colour_of, panels, save, short, write_csv
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mmorepa.cli import one_line_errors
from mmorepa.utils.files import check_outputs

COLUMNS = 3
# So many points are shown one by one.
FEW = 50
# In the records of a validation, but not measured by it.
NO_METRICS = {'data_time', 'time', 'step', 'iter', 'epoch', 'memory'}
BRANCH_KINDS = ('branch_share/', 'branch_scale/', 'kernel_step/')
Series = list[tuple[float, float]]


class Run(NamedTuple):
    """What a training has logged, as points of x and value."""

    name: str
    # That of x, 'epoch' or 'iteration'.
    unit: str
    losses: Series
    rates: Series
    # Of the validations, by name.
    metrics: dict[str, Series]
    # What BranchStatisticsHook wrote, if it did, by its names.
    branches: dict[str, Series]


def read_run(folder: Path, name: Optional[str] = None) -> Run:
    """Reads the logs in a work folder, those before the training was resumed too.

    The name defaults to that of the folder.
    """
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(
            f"no log of a training, */vis_data/scalars.json, under '{folder}'"
        )
    unit, series = 'iteration', {}
    for file in files:
        try:
            records = [json.loads(line) for line in file.read_text().splitlines()]
        except ValueError as error:
            raise ValueError(f"'{file}' is damaged: {error}") from error
        trained = [record for record in records if 'loss' in record]
        if not trained:
            continue
        epochs, found = 1.0, {}
        if 'epoch' in trained[-1]:
            unit, epochs = 'epoch', trained[-1]['step'] / trained[-1]['epoch']
        for record in records:
            kinds = ('loss', *BRANCH_KINDS)
            counts_steps = any(key.startswith(kinds) for key in record)
            x = record['step'] / (epochs if counts_steps else 1)
            for key in ('loss', 'base_lr') if 'loss' in record else record:
                if isinstance(record.get(key), (int, float)) and key not in NO_METRICS:
                    found.setdefault(key, []).append((x, record[key]))
        for key, later in found.items():
            # What a later run repeats, it replaces.
            earlier = [point for point in series.get(key, ()) if point[0] < later[0][0]]
            series[key] = earlier + later
    if 'loss' not in series:
        raise ValueError(f"no loss is logged under '{folder}'")
    losses, rates = series.pop('loss'), series.pop('base_lr', [])
    branches = {k: v for k, v in series.items() if k.startswith(BRANCH_KINDS)}
    metrics = {k: v for k, v in series.items() if k not in branches}
    return Run(name or str(folder), unit, losses, rates, metrics, branches)


def _finish(axes: Axes, unit: str) -> None:
    axes.set_xlabel(unit)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _draw(axes: Axes, runs: Sequence[Run], every: list[Series], title: str) -> None:
    """A line for each run that has points, which are seen where they are few."""
    for run, series, colour in zip(runs, every, SERIES):
        if series:
            style = '.-' if len(series) < FEW else '-'
            axes.plot(*zip(*series), style, color=colour, label=run.name)
    axes.set(title=title)
    _finish(axes, runs[0].unit)


def draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    """The training losses."""
    _draw(axes, runs, [run.losses for run in runs], 'Training loss')
    every = [loss for run in runs for _, loss in run.losses]
    if min(every) > 0 and max(every) > 10 * min(every):
        axes.set_yscale('log')
        # Not as powers of ten.
        axes.yaxis.set_major_formatter('{x:g}')


def draw_metric(axes: Axes, runs: Sequence[Run], metric: str) -> None:
    """A metric of the validations, zoomed to where the runs differ."""
    found = [run.metrics.get(metric, []) for run in runs]
    _draw(axes, runs, found, f'Validation: {metric}')
    every = [y for series in found for _, y in series]
    # Those of the second half.
    late = [y for series in found for x, y in series if 2 * x >= series[-1][0]]
    low, high = min(late), max(late)
    if max(every) - min(every) > 1.5 * (high - low) > 0:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axes.set_title(f'Validation: {metric}\n(zoomed: early values lie outside)')


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draws the losses, the learning rates and each metric, side by side."""
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    columns = min(COLUMNS, 2 + len(metrics))
    lines = -(-(2 + len(metrics)) // columns)
    size = 4.6 * columns, 3.6 * lines + 0.3 * len(runs)
    figure, grid = panels(lines, columns, *size)
    first, second, *others = grid.flat
    draw_losses(first, runs)
    # Before the multipliers of parameters.
    _draw(second, runs, [run.rates for run in runs], 'Learning rate')
    for axes, metric in zip(others, metrics):
        draw_metric(axes, runs, metric)
    for axes in others[len(metrics) :]:
        axes.axis('off')
    figure.legend(*first.get_legend_handles_labels(), loc='outside lower center')
    save(figure, path)


def plot_branches(run: Run, path: Path) -> None:
    """What each branch puts in while a network trains, and how far kernels move."""
    shares: dict[str, list[Series]] = {}
    steps: dict[str, Series] = {}
    for name, series in run.branches.items():
        kind, layer, *branch = name.split('/')
        if kind == 'branch_share':
            shares.setdefault(branch[0], []).append(series)
        elif kind == 'kernel_step':
            steps[layer] = series
    if not shares or not steps:
        raise ValueError(
            f'{run.name} has no statistics of branches: train with custom_hooks='
            "[dict(type='BranchStatisticsHook')]"
        )
    figure, ((left, right),) = panels(1, 2, 11, 4)
    for branch, all_series in shares.items():
        x, y = np.mean(all_series, axis=0).T
        left.plot(x, y, '.-', color=colour_of(branch), label=branch)
    # The legend is above the lines.
    highest = max(line.get_ydata().max() for line in left.lines)
    left.set(
        title='What each branch puts into the kernels\n(share of the norms, mean of '
        'the layers)',
        ylabel='share',
        ylim=(0, 1.4 * highest),
    )
    left.legend(loc='upper center', fontsize='small', ncols=3)

    first, *rest = steps
    right.plot(*zip(*steps[first]), '.-', color=VERMILION, label=short(first))
    if rest:
        x, values = np.array([steps[name] for name in rest]).transpose(2, 1, 0)
        x = x[:, 0]
        style = dict(color=BLACK, label='median of the other convs')
        right.plot(x, np.median(values, axis=1), '.-', **style)
        style = dict(color='#BBBBBB', alpha=0.5, linewidth=0, label='all of them')
        right.fill_between(x, values.min(axis=1), values.max(axis=1), **style)
    right.set(
        title='How far a step moves a folded kernel,\nrelative to the kernel',
        ylabel='relative step',
        yscale='log',
    )
    right.legend(fontsize='small')
    for axes in (left, right):
        _finish(axes, run.unit)
    save(figure, path)


def table_of(runs: Sequence[Run]) -> list[dict]:
    """A row for each number of the figure."""
    return [
        {'run': run.name, 'what': what, run.unit: float(x), 'value': float(y)}
        for run in runs
        for what, series in (('loss', run.losses), *run.metrics.items())
        for x, y in series
    ]


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    numbers = args.out.with_suffix('.csv')
    check_outputs([args.out, numbers, args.branches])
    if len(args.runs) > len(SERIES):
        raise ValueError(f'at most {len(SERIES)} runs can be told apart in a figure')
    runs = [read_run(folder) for folder in args.runs]
    if len({run.unit for run in runs}) > 1:
        raise ValueError('some runs count epochs, and others iterations')
    for run in runs:
        last = [f'{name} {series[-1][1]:.4g}' for name, series in run.metrics.items()]
        print(f'Last validation of {run.name}: {", ".join(last) or "none"}.')
    if args.branches:  # First, since it may fail.
        plot_branches(runs[0], args.branches)
    plot(runs, args.out)
    write_csv(table_of(runs), numbers)
    print(f'Wrote {args.out} and {numbers}.')


if __name__ == '__main__':
    main()
