"""Tables and figures of the accuracy study."""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Optional

import matplotlib.pyplot as plt
import pandas as pd
from accuracy_runs import (
    ABLATIONS,
    BLOCKS,
    DATA,
    DECAYS,
    FACTORS,
    LONGER,
    NETWORKS,
    REFERENCE,
    STANDARD,
    STEMS,
    VARIANTS,
    curve_of,
    standard_epochs,
    training_seconds,
)
from studies import (
    Line,
    Report,
    draw_differences,
    markdown_table,
    mean_and_deviation,
    paired_difference,
    panels,
)

from mmorepa.utils.tables import counted

# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = dict(none='#000000', dbb='#E69F00', orepa='#0072B2', repvgg='#009E73')

ACCURACY = 'top-1 accuracy (%)'


class Study:
    """The rows of one data set, by what they are compared by.

    Args:
        rows (pd.DataFrame): All rows of the study, as text.
        data (str): A key of :data:`DATA`.
        epochs (int, optional): Of the standard variant. Defaults to the config's.
    """

    def __init__(
        self, rows: pd.DataFrame, data: str, epochs: Optional[int] = None
    ) -> None:
        self.data, standard = data, standard_epochs(data, epochs)
        lengths = {name: str(v.epochs(standard)) for name, v in VARIANTS.items()}
        is_ours = (rows.data == data) & (rows.epochs == rows.variant.map(lengths))
        rows = rows[is_ours].set_index('seed')
        seconds = [training_seconds(row) for row in rows.to_dict('records')]
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

    def best(self, network: str, block: str) -> Optional[pd.DataFrame]:
        """The rows of the learning rate with the highest mean over common seeds.

        None if the rates have no common seeds. A training that diverged is the worst.
        """
        found = {f: self.of(network, block, factor=f) for f in FACTORS}
        every = {f: rows.accuracy for f, rows in found.items()}
        every = pd.concat(every, axis=1, join='inner').fillna(-float('inf'))
        return found[every.mean().idxmax()] if len(every) else None


def _minus(
    rows: pd.DataFrame, reference: pd.DataFrame, beside: Optional[pd.DataFrame] = None
) -> str:
    """A difference, with its pairs if these are fewer than the rows beside it."""
    found = paired_difference(rows.accuracy, reference.accuracy)
    if found is None or rows is reference:
        return ''
    seeds = len(rows if beside is None else beside)
    pairs = '' if found.pairs == seeds else f' ({counted(found.pairs, "pair")})'
    return f'{found}{pairs}'


def _relative_time(
    rows: pd.DataFrame, plain: pd.DataFrame, length: Fraction = Fraction(1)
) -> str:
    """Ratios of training time, of those seeds that are of one device."""
    if rows is plain:
        return f'{float(length):.2f}'
    both = rows.join(plain.add_suffix('_plain'), how='inner')
    both = both[both.device == both.device_plain]
    return mean_and_deviation(both.training / both.training_plain * float(length))


def _blocks() -> Iterator[tuple[str, str, str]]:
    for network, blocks in BLOCKS.items():
        for block, text in blocks.items():
            yield network, block, f'{NETWORKS[network]}, {text}'


def main_table(study: Study) -> str:
    """One recipe for all, that of the plain network."""
    rows = []
    for network, block, text in _blocks():
        found, plain = study.of(network, block), study.of(network, REFERENCE)
        if len(found):
            row = {'': text, ACCURACY: mean_and_deviation(found.accuracy)}
            row['minus plain'] = _minus(found, plain)
            row['OREPA minus this'] = _minus(study.of(network, 'orepa'), found, found)
            row['training time / plain'] = _relative_time(found, plain)
            row['deployed parameters'] = f'{int(found.deployed_parameters.iloc[0]):,}'
            rows.append({**row, 'seeds': str(len(found))})
    return markdown_table(rows)


def rates_table(study: Study) -> str:
    """Each block's best learning rate, with the number of seeds of each."""
    rows = []
    for network, block, text in _blocks():
        best, plain_best = study.best(network, block), study.best(network, REFERENCE)
        if best is None:
            continue
        row = {f'{ACCURACY}, seeds': text}
        for factor in FACTORS:
            found = study.of(network, block, factor=factor)
            mark = '**' if found is best else ''
            cell = f'{mark}{mean_and_deviation(found.accuracy)}{mark}, {len(found)}'
            row[f'learning rate x {factor}'] = cell
        difference = '' if plain_best is None else _minus(best, plain_best)
        rows.append({**row, 'best minus best plain': difference})
    return markdown_table(rows)


def variants_table(study: Study, names: Sequence[str]) -> str:
    """Blocks with each of these changes, beside the whole and the plain network."""
    network, rows = 'resnet18', []
    plain, orepa = study.of(network, REFERENCE), study.of(network, 'orepa')
    for block, text in BLOCKS[network].items():
        whole = study.of(network, block)
        changed = {f'{text}, {VARIANTS[n].text}': n for n in names}
        changed = {t: study.of(network, block, n) for t, n in changed.items()}
        changed = {t: found for t, found in changed.items() if len(found)}
        for name, found in {text: whole, **changed}.items():
            if len(whole) and changed:
                row = {'slim ResNet-18': name}
                row[ACCURACY] = mean_and_deviation(found.accuracy)
                row['minus unchanged'] = _minus(found, whole)
                row['minus plain'] = _minus(found, plain)
                is_orepa = block == 'orepa'
                row['OREPA minus this'] = (
                    '' if is_orepa else _minus(orepa, found, found)
                )
                rows.append({**row, 'seeds': str(len(found))})
    return markdown_table(rows)


def budget_table(study: Study) -> str:
    """OREPA beside trainings that take longer than it, or as long."""
    rows = []
    longer = study.rows[study.rows.variant.isin(LONGER)]
    for network, block, text in _blocks():
        standard, plain = study.of(network, block), study.of(network, REFERENCE)
        is_longer = any((longer.network == network) & (longer.block == block))
        if not is_longer and (block != 'orepa' or network not in {*longer.network}):
            continue
        for name in (STANDARD, *LONGER) if is_longer else [STANDARD]:
            found = study.of(network, block, name)
            if len(found):
                row = {'': f'{text}, {found.epochs.iloc[0]} epochs'}
                row[ACCURACY] = mean_and_deviation(found.accuracy)
                # An epoch takes as long, however many there are.
                length = VARIANTS[name].length
                row['training time / plain'] = _relative_time(standard, plain, length)
                plain_as_long = study.of(network, REFERENCE, name)
                row['minus plain of as many epochs'] = _minus(found, plain_as_long)
                orepa = study.of(network, 'orepa')
                row['standard OREPA minus this'] = _minus(orepa, found, found)
                rows.append({**row, 'seeds': str(len(found))})
    return markdown_table(rows)


def stems_table(studies: Sequence[Study]) -> str:
    """The stem alone, the stages alone, and both, wherever one stem was trained."""
    forms = {'plain': (REFERENCE, STANDARD)}
    forms |= {f'plain, {VARIANTS[name].text}': (REFERENCE, name) for name in STEMS}
    forms |= {'OREPA, plain stem': ('orepa', 'plain_stem')}
    forms |= {'OREPA': ('orepa', STANDARD)}
    rows = []
    for study, network, factor in itertools.product(studies, NETWORKS, FACTORS):
        found = {t: study.of(network, *form, factor) for t, form in forms.items()}
        plain, *stems, _, orepa = found.values()
        for text, form in found.items() if any(map(len, stems)) else ():
            if len(form):
                row = {'': f'{NETWORKS[network]}, {text}', 'data': DATA[study.data]}
                row['learning rate x'] = factor
                row[ACCURACY] = mean_and_deviation(form.accuracy)
                row['minus plain'] = _minus(form, plain)
                row['OREPA minus this'] = _minus(orepa, form, form)
                rows.append({**row, 'seeds': str(len(form))})
    return markdown_table(rows)


TABLES: dict[str, Callable[[Study], str]] = dict(
    main=main_table,
    rates=rates_table,
    budget=budget_table,
    ablations=partial(variants_table, names=ABLATIONS),
    decays=partial(variants_table, names=DECAYS),
)


def tables_of(studies: Sequence[Study]) -> dict[str, str]:
    """Markdown tables by name, like ``main-10pct``; those without rows are left out."""
    found = {
        f'{name}-{study.data}': make(study)
        for study in studies
        for name, make in TABLES.items()
    }
    found['stems'] = stems_table(studies)
    return {name: table for name, table in found.items() if table}


def _lines(*lines: Line) -> list[Line]:
    """Those that have a pair."""
    return [line for line in lines if paired_difference(line.values, line.reference)]


def block_lines(study: Study) -> list[Line]:
    """Each block beside plain, by one recipe and by the best learning rates."""
    lines = []
    for network, block, _ in _blocks():
        names = [(network, block), (network, REFERENCE)] if block != REFERENCE else []
        for kind, of in {'': study.of, ', best rates': study.best}.items():
            pair = [of(*name) for name in names]
            if pair and all(found is not None for found in pair):
                text = f'{BLOCKS[network][block]}{kind}\n{NETWORKS[network]}'
                values = (found.accuracy for found in pair)
                lines.append(Line(text, COLOURS[block], *values, not kind))
    return _lines(*lines)


def ablation_lines(study: Study) -> list[Line]:
    """Plain and each ablation beside the whole; none without ablations."""
    whole = study.of('resnet18', 'orepa').accuracy
    plain = study.of('resnet18', REFERENCE).accuracy
    found = {n: study.of('resnet18', 'orepa', n).accuracy for n in ABLATIONS}
    lines = _lines(
        *(Line(VARIANTS[n].text, 'tab:blue', v, whole) for n, v in found.items())
    )
    plain_line = Line('the plain network', 'black', plain, whole)
    return [*_lines(plain_line), *lines] if lines else []


def plot_differences(
    studies: Sequence[Study],
    make: Callable[[Study], list[Line]],
    label: str,
    title: str,
) -> Optional[plt.Figure]:
    """A panel for each data set that has something to draw, if there is one."""
    found = {study.data: make(study) for study in studies}
    found = {data: lines for data, lines in found.items() if lines}
    if not found:
        return None
    width, height = 5.2 * len(found), 1.6 + 0.36 * max(map(len, found.values()))
    figure, grid = panels(1, len(found), max(6.5, width), height, sharex=True)
    for axes, (data, lines) in zip(grid[0], found.items()):
        draw_differences(axes, lines)
        axes.set(title=DATA[data], xlabel=f'{label}\n← worse          better →')
    figure.suptitle(textwrap.fill(title, 70 * len(found)), fontsize='medium')
    return figure


# Times plain's training, on the figure of the budget.
MOST_TIME = 2.5
# A step with the OREPA stem, times plain's, by train_cost.py on these slim networks:
# the trainings of the stems ran beside other programs.
STEM_TIME = 1.14


def plot_budget(studies: Sequence[Study]) -> Optional[plt.Figure]:
    """A curve of accuracy over seconds for each block, if there is one."""
    found = [
        (study, network)
        for study in studies
        for network in NETWORKS
        if len(study.of(network, REFERENCE))
    ]
    if not found:
        return None
    columns, lines = min(2, len(found)), -(-len(found) // 2)
    size = max(6.5, 5.2 * columns), 0.5 + 3.6 * lines
    figure, grid = panels(lines, columns, *size)
    for axes in grid.flat[len(found) :]:
        axes.axis('off')
    for axes, (study, network) in zip(grid.flat, found):
        _draw_budget(axes, study, network)
    title = (
        'Accuracy for the time spent: mean and standard deviation of the seeds, whose '
        'number is in brackets.\nDotted: where plain ends.'
    )
    if any(study.rows.variant.isin(LONGER).any() for study in studies):
        title += ' Rings: trainings of more epochs.'
    figure.suptitle(title, fontsize='medium')
    return figure


def _mean_curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Means of seconds and accuracies, and deviations of these, for each epoch."""
    points = pd.DataFrame(
        (point.epoch, training_seconds(row, point), point.metric)
        for row in rows.to_dict('records')
        for point in curve_of(row)
    ).groupby(0)
    return pd.DataFrame(
        dict(x=points[1].mean(), mean=points[2].mean(), std=points[2].std().fillna(0))
    )


def _draw_budget(axes: plt.Axes, study: Study, network: str) -> None:
    ends, plain_end = [], float('inf')
    device = study.of(network, REFERENCE).device.iloc[0]

    def of(block: str, variant: str = STANDARD) -> pd.DataFrame:
        """Those that did not diverge and whose seconds can be compared."""
        found = study.of(network, block, variant)
        return found[found.accuracy.notna() & (found.device == device)]

    for block, text in BLOCKS[network].items():
        colour, rows = COLOURS[block], of(block)
        if rows.empty:
            continue
        curve = _mean_curve(rows)
        end = curve.iloc[-1]
        if block == REFERENCE:
            plain_end = end.x
            axes.axvline(plain_end, color=colour, linestyle=':', linewidth=1)
        label = f'{text} ({len(rows)})'
        if end.x > MOST_TIME * plain_end:
            label += f': {end["mean"]:.1f} % after {end.x:.0f} s'
        else:
            ends.append(end['mean'])
        axes.plot(curve.x, curve['mean'], marker='.', color=colour, label=label)
        axes.plot(end.x, end['mean'], marker='o', color=colour)
        band = (curve['mean'] - curve['std'], curve['mean'] + curve['std'])
        axes.fill_between(curve.x, *band, color=colour, alpha=0.15, linewidth=0)
        for name, length in LONGER.items():
            if len(longer := of(block, name)):
                # An epoch takes as long, however many there are.
                _draw_ring(axes, longer, end.x * float(length), colour)
                ends.append(longer.accuracy.mean())
    if len(rows := of(REFERENCE, STEMS[0])):
        label = f'plain, {VARIANTS[STEMS[0]].text} ({len(rows)})'
        style = dict(fmt='D', color='#D55E00', capsize=3, label=label)
        mean = rows.accuracy.mean()
        axes.errorbar(STEM_TIME * plain_end, mean, rows.accuracy.std(), **style)
        ends.append(mean)
    # The first epochs would take all of the height.
    low, high = min(ends, default=0), max(ends, default=0)
    reach = max(high - low, 1.0)
    axes.set_ylim(low - 2 * reach, high + 0.8 * reach)
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


def _draw_ring(axes: plt.Axes, rows: pd.DataFrame, seconds: float, colour: str) -> None:
    """Where trainings of more epochs end."""
    mean, deviation = rows.accuracy.mean(), rows.accuracy.std()
    style = dict(fmt='o', markersize=8, markerfacecolor='none', capsize=3)
    axes.errorbar(seconds, mean, deviation, color=colour, **style)
    axes.annotate(
        f'{rows.epochs.iloc[0]} epochs ({len(rows)})',
        (seconds, mean),
        xytext=(-7, 5),
        textcoords='offset points',
        ha='right',
        color=colour,
        fontsize='small',
    )


FIGURES = dict(
    differences='Differences to plain, seed by seed, with their means and intervals',
    ablations='Differences to OREPA without its parts, or changed',
    budget='Accuracy over seconds of training',
)


def report(rows: pd.DataFrame, epochs: Optional[int] = None) -> Report:
    """Tables and figures of all rows; none where no row can be compared."""
    studies = [Study(rows, data, epochs) for data in DATA]
    left_out = len(rows) - sum(len(study.rows) for study in studies)
    if left_out:
        print(
            f'Left out: {left_out} rows of other numbers of epochs, or of variants '
            'that are not known.'
        )
    tables = tables_of(studies)
    if not tables:
        print(
            f"No tables yet: each compares with trainings of '--variants {STANDARD} "
            "--lr-factors 1' of as many epochs as the config has, or --epochs."
        )
    figures = dict(
        differences=plot_differences(
            studies,
            block_lines,
            'points of accuracy beyond plain',
            'Small dots are seeds, the large mark is their mean, with its 95 % '
            'interval and the number of seeds. Dots: one recipe for all. Squares: the '
            'best of three learning rates for each.',
        ),
        ablations=plot_differences(
            studies,
            ablation_lines,
            'points of accuracy beyond OREPA',
            'OREPA without its parts, or changed: small dots are seeds, the large one '
            'is their mean, with its 95 % interval and the number of seeds',
        ),
        budget=plot_budget(studies),
    )
    return tables, {n: (f, FIGURES[n]) for n, f in figures.items() if f}
