"""Tables and figures of the accuracy study."""

import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import Optional

import accuracy_runs as runs
import matplotlib.pyplot as plt
import pandas as pd
from accuracy_runs import BLOCKS, DATA, LONGER, NETWORKS, REFERENCE, STANDARD, VARIANTS
from studies import (
    Line,
    Report,
    charts,
    draw_differences,
    markdown_table,
    mean_and_deviation,
    mean_and_interval,
    paired_differences,
)

from mmorepa.utils.tables import counted

COLOURS = dict(
    none=charts.BLACK, dbb=charts.ORANGE, orepa=charts.BLUE, repvgg=charts.GREEN
)
ACCURACY = 'top-1 accuracy (%)'


class Study:
    """Those rows of a study that are of one data set, by what they are compared by.

    The standard variant has the given number of epochs, or that of the config.
    """

    def __init__(
        self, rows: pd.DataFrame, data: str, epochs: Optional[int] = None
    ) -> None:
        self.data, standard = data, runs.standard_epochs(data, epochs)
        lengths = {name: str(v.epochs(standard)) for name, v in VARIANTS.items()}
        is_ours = (rows.data == data) & (rows.epochs == rows.variant.map(lengths))
        rows = rows[is_ours].set_index('seed')
        seconds = [runs.training_seconds(row) for row in rows.to_dict('records')]
        rows = rows.assign(accuracy=rows.accuracy.astype(float), training=seconds)
        self.rows, names = rows, ['network', 'block', 'variant', 'lr_factor']
        self._groups = dict(iter(rows.groupby(names)))

    def of(
        self, network: str, block: str, variant: str = STANDARD, factor: str = '1'
    ) -> pd.DataFrame:
        """Rows by seed, with numbers for ``accuracy`` and for seconds of ``training``.

        The accuracy of a training that diverged is NaN.
        """
        key = (network, block, variant, factor)
        return self._groups.get(key, self.rows.iloc[:0])

    def best(self, network: str, block: str) -> pd.DataFrame:
        """The rows of the learning rate with the highest mean over common seeds.

        A training that diverged is the worst.
        """
        found = {f: self.of(network, block, factor=f) for f in runs.FACTORS}
        every = {f: rows.accuracy for f, rows in found.items()}
        every = pd.concat(every, axis=1, join='inner').fillna(-float('inf'))
        return found[every.mean().idxmax()] if len(every) else self.rows.iloc[:0]

    def line(
        self, network: str, block: str, variant: str = STANDARD, factor: str = '1'
    ) -> dict[str, str]:
        """What tables say of these trainings, by column; empty where there are none."""
        found = self.of(network, block, variant, factor)
        if found.empty:
            return {}
        plain, orepa, unchanged = (
            self.of(network, kind, factor=factor)
            for kind in (REFERENCE, 'orepa', block)
        )
        plain_as_long = self.of(network, REFERENCE, variant, factor)
        change, name = VARIANTS[variant], BLOCKS[network][block]
        changed = f'{name}, {change.text}' if change.text else name
        orepa_minus_this = _minus(orepa, found, found)
        return {
            'network': f'{NETWORKS[network]}, {name}',
            'changed network': f'{NETWORKS[network]}, {changed}',
            'epochs': f'{NETWORKS[network]}, {name}, {found.epochs.iloc[0]} epochs',
            'changed': changed,
            'data': DATA[self.data],
            'learning rate x': factor,
            ACCURACY: mean_and_deviation(found.accuracy),
            'minus unchanged': _minus(found, unchanged),
            'minus plain': _minus(found, plain),
            'minus plain of as many epochs': _minus(found, plain_as_long),
            'OREPA minus this': orepa_minus_this,
            'standard OREPA minus this': orepa_minus_this,
            # An epoch takes as long, however many there are.
            'training time / plain': _relative_time(unchanged, plain, change.length),
            'deployed parameters': f'{int(found.deployed_parameters.iloc[0]):,}',
            'seeds': str(len(found)),
        }


def _minus(
    rows: pd.DataFrame, reference: pd.DataFrame, beside: Optional[pd.DataFrame] = None
) -> str:
    """A difference, with its pairs if these are fewer than the rows beside it."""
    if rows is reference:
        return ''
    found = paired_differences(rows.accuracy, reference.accuracy)
    text, seeds = mean_and_interval(found), len(rows if beside is None else beside)
    is_whole = len(found) in (0, seeds)
    return text if is_whole else f'{text} ({counted(len(found), "pair")})'


def _relative_time(rows: pd.DataFrame, plain: pd.DataFrame, length: Fraction) -> str:
    """Ratios of training time, of those seeds that are of one device."""
    if rows is plain:
        return f'{float(length):.2f}'
    both = rows.join(plain.add_suffix('_plain'), how='inner')
    both = both[both.device == both.device_plain]
    return mean_and_deviation(both.training / both.training_plain * float(length))


def _table(lines: Iterable[dict[str, str]], first: str, *others: str, head='') -> str:
    """The lines of trainings that there are: these columns, the first with a head."""
    return markdown_table(
        {head: line[first], **{column: line[column] for column in others}}
        for line in lines
        if line
    )


PLACES = [(network, block) for network, blocks in BLOCKS.items() for block in blocks]


def main_table(study: Study) -> str:
    """One recipe for all, that of the plain network."""
    lines = [study.line(*place) for place in PLACES]
    columns = (ACCURACY, 'minus plain', 'OREPA minus this', 'training time / plain')
    return _table(lines, 'network', *columns, 'deployed parameters', 'seeds')


def rates_table(study: Study) -> str:
    """Each block's best learning rate, with the number of seeds of each."""
    rows = []
    for network, block in PLACES:
        best = study.best(network, block)
        text = f'{NETWORKS[network]}, {BLOCKS[network][block]}'
        row = {f'{ACCURACY}, seeds': text}
        for factor in runs.FACTORS:
            found = study.of(network, block, factor=factor)
            mark = '**' if found is best else ''
            cell = f'{mark}{mean_and_deviation(found.accuracy)}{mark}, {len(found)}'
            row[f'learning rate x {factor}'] = cell
        row['best minus best plain'] = _minus(best, study.best(network, REFERENCE))
        if len(best):
            rows.append(row)
    return markdown_table(rows)


def variants_table(study: Study, names: Sequence[str]) -> str:
    """Blocks with each of these changes, beside the whole and the plain network."""
    every = []
    for block in BLOCKS['resnet18']:
        lines = [study.line('resnet18', block, name) for name in (STANDARD, *names)]
        if block == 'orepa':
            lines = [line and {**line, 'OREPA minus this': ''} for line in lines]
        if lines[0] and any(lines[1:]):
            every += lines
    columns = (ACCURACY, 'minus unchanged', 'minus plain', 'OREPA minus this', 'seeds')
    return _table(every, 'changed', *columns, head='slim ResNet-18')


def budget_table(study: Study) -> str:
    """OREPA beside trainings that take longer than it, or as long."""
    longer = study.rows[study.rows.variant.isin(LONGER)]
    places = {*zip(longer.network, longer.block)}
    places |= {(network, 'orepa') for network in longer.network}
    lines = [
        study.line(*place, name)
        for place in PLACES
        for name in (STANDARD, *LONGER)
        if place in places
    ]
    columns = ('minus plain of as many epochs', 'standard OREPA minus this', 'seeds')
    return _table(lines, 'epochs', ACCURACY, 'training time / plain', *columns)


def stems_table(studies: Sequence[Study]) -> str:
    """The stem alone, the stages alone, and both, wherever one stem was trained."""
    stems = [(REFERENCE, name) for name in runs.STEMS]
    forms = [
        (REFERENCE, STANDARD),
        *stems,
        ('orepa', 'plain_stem'),
        ('orepa', STANDARD),
    ]
    every = []
    for study, network, factor in itertools.product(studies, NETWORKS, runs.FACTORS):
        lines = {form: study.line(network, *form, factor) for form in forms}
        if any(lines[stem] for stem in stems):
            every += lines.values()
    columns = ('data', 'learning rate x', ACCURACY, 'minus plain', 'OREPA minus this')
    return _table(every, 'changed network', *columns, 'seeds')


TABLES: dict[str, Callable[[Study], str]] = dict(
    main=main_table,
    rates=rates_table,
    budget=budget_table,
    ablations=partial(variants_table, names=runs.ABLATIONS),
    decays=partial(variants_table, names=runs.DECAYS),
)


def block_lines(study: Study) -> list[Line]:
    """Each block beside plain, by one recipe and by the best learning rates."""
    lines = []
    for network, block in PLACES:
        for kind, of in {'': study.of, ', best rates': study.best}.items():
            found, plain = of(network, block), of(network, REFERENCE)
            each = paired_differences(found.accuracy, plain.accuracy)
            if len(each) and block != REFERENCE:
                name = f'{BLOCKS[network][block]}{kind}\n{NETWORKS[network]}'
                lines.append(Line(name, COLOURS[block], each, not kind))
    return lines


def ablation_lines(study: Study) -> list[Line]:
    """Plain and each ablation beside the whole; none without ablations."""
    whole, plain = (study.of('resnet18', b).accuracy for b in ('orepa', REFERENCE))
    lines = []
    for name in runs.ABLATIONS:
        found = study.of('resnet18', 'orepa', name).accuracy
        each = paired_differences(found, whole)
        if len(each):
            lines.append(Line(VARIANTS[name].text, 'tab:blue', each))
    plain_line = Line('the plain network', 'black', paired_differences(plain, whole))
    return [plain_line, *lines] if lines else []


def plot_differences(
    studies: Sequence[Study],
    make: Callable[[Study], list[Line]],
    label: str,
    title: str,
) -> Optional[plt.Figure]:
    """A panel for each data set that has something to draw, if there is one."""
    lines = {study.data: make(study) for study in studies}
    lines = {data: some for data, some in lines.items() if some}
    if not lines:
        return None
    width, height = 5.2 * len(lines), 1.6 + 0.36 * max(map(len, lines.values()))
    figure, grid = charts.panels(1, len(lines), max(6.5, width), height, sharex=True)
    for axes, data in zip(grid[0], lines):
        draw_differences(axes, lines[data])
        axes.set(title=DATA[data], xlabel=f'{label}\n← worse          better →')
    figure.suptitle(textwrap.fill(title, 70 * len(lines)), fontsize='medium')
    return figure


# Times plain's training, on the figure of the budget.
MOST_TIME = 2.5
# A step with the OREPA stem, times plain's, by train_cost.py on these slim networks:
# the trainings of the stems ran beside other programs.
STEM_TIME = 1.01


def plot_budget(studies: Sequence[Study]) -> Optional[plt.Figure]:
    """A curve of accuracy over seconds for each block, if there is one."""
    places = [
        (study, network)
        for study in studies
        for network in NETWORKS
        if study.of(network, REFERENCE).accuracy.notna().any()
    ]
    if not places:
        return None
    columns, lines = min(2, len(places)), -(-len(places) // 2)
    size = max(6.5, 5.2 * columns), 0.5 + 3.6 * lines
    figure, grid = charts.panels(lines, columns, *size)
    for axes in grid.flat[len(places) :]:
        axes.axis('off')
    for axes, place in zip(grid.flat, places):
        _draw_budget(axes, *place)
    figure.suptitle(
        'Accuracy for the time spent: mean and standard deviation of the seeds, whose '
        'number is in brackets.\nDotted: where plain ends. Rings: trainings of more '
        'epochs.',
        fontsize='medium',
    )
    return figure


def _mean_curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Means of seconds and accuracies, and deviations of these, for each epoch."""
    points = pd.DataFrame(
        (point.epoch, runs.training_seconds(row, point), point.metric)
        for row in rows.to_dict('records')
        for point in runs.curve_of(row)
    ).groupby(0)
    return pd.DataFrame(
        dict(x=points[1].mean(), mean=points[2].mean(), std=points[2].std().fillna(0))
    )


def _draw_budget(axes: plt.Axes, study: Study, network: str) -> None:
    device = study.of(network, REFERENCE).device.iloc[0]

    def of(block: str, variant: str = STANDARD) -> pd.DataFrame:
        """Those that did not diverge and whose seconds can be compared."""
        found = study.of(network, block, variant)
        return found[found.accuracy.notna() & (found.device == device)]

    def mark(x: float, rows: pd.DataFrame, style: str, **options) -> None:
        y, deviation = rows.accuracy.mean(), rows.accuracy.std()
        ends.append((x, y))
        axes.errorbar(x, y, deviation, fmt=style, capsize=3, **options)

    ends = []
    plain_end = _mean_curve(of(REFERENCE)).x.iloc[-1]
    axes.axvline(plain_end, color='black', linestyle=':', linewidth=1)
    for block, text in BLOCKS[network].items():
        colour, rows = COLOURS[block], of(block)
        if rows.empty:
            continue
        curve = _mean_curve(rows)
        x, y, _ = curve.iloc[-1]
        label = f'{text} ({len(rows)}): {y:.1f} % after {x:.0f} s'
        axes.plot(curve.x, curve['mean'], marker='.', color=colour, label=label)
        band = (curve['mean'] - curve['std'], curve['mean'] + curve['std'])
        axes.fill_between(curve.x, *band, color=colour, alpha=0.15, linewidth=0)
        mark(x, rows, 'o', color=colour)
        for name, length in LONGER.items():
            # An epoch takes as long, however many there are.
            if len(longer := of(block, name)):
                mark(x * float(length), longer, 'o', color=colour, mfc='none')
    if len(rows := of(REFERENCE, runs.STEMS[0])):
        label = f'plain, {VARIANTS[runs.STEMS[0]].text} ({len(rows)})'
        mark(STEM_TIME * plain_end, rows, 'D', color=charts.VERMILION, label=label)
    # The first epochs would take all of the height, and a curve of several times the
    # others' length all of the width.
    most = MOST_TIME * plain_end
    heights = [y for x, y in ends if x <= most]
    low, high = min(heights), max(heights)
    reach = max(high - low, 1.0)
    axes.set_ylim(low - 2 * reach, high + 0.8 * reach)
    axes.set_xlim(0, min(axes.get_xlim()[1], most))
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    unit = ', of one core' if device == 'cpu' else f' on a shared {device}'
    axes.set(
        title=f'{NETWORKS[network]}, {DATA[study.data]}',
        xlabel=f'seconds of training{unit}',
        ylabel='top-1 accuracy (%)',
    )


def report(rows: pd.DataFrame, epochs: Optional[int] = None) -> Report:
    """Those tables and figures of all rows that have something to show."""
    studies = [Study(rows, data, epochs) for data in DATA]
    left_out = len(rows) - sum(len(study.rows) for study in studies)
    if left_out:
        print(
            f'Left out: {left_out} rows of other numbers of epochs, or of variants '
            'that are not known.'
        )
    # By name, like main-10pct.
    tables = {
        f'{name}-{study.data}': make(study)
        for study in studies
        for name, make in TABLES.items()
    }
    tables['stems'] = stems_table(studies)
    marks = 'small dots are seeds, the large mark is their mean, with its 95 % interval'
    figures = dict(
        differences=plot_differences(
            studies,
            block_lines,
            'points of accuracy beyond plain',
            f'Beyond plain: {marks} and the number of seeds. Dots: one recipe for all. '
            'Squares: the best of three learning rates for each.',
        ),
        ablations=plot_differences(
            studies,
            ablation_lines,
            'points of accuracy beyond OREPA',
            f'OREPA without its parts, or changed: {marks} and the number of seeds',
        ),
        budget=plot_budget(studies),
    )
    tables = {name: table for name, table in tables.items() if table}
    return tables, {name: figure for name, figure in figures.items() if figure}
