"""Is a re-parameterised network better than the plain one, and by how much?

Slim networks are trained on Fashion-MNIST with each block, learning rate and seed, and
OREPA without each of its parts. Seeds change initialisation, order and augmentation
alike for all blocks, so that differences to the plain network are taken within a seed.
A stopped run goes on where it was, and the rows of several machines can be merged.
"""

import argparse
import os
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

# Before NumPy and PyTorch are loaded: there is a process for each core.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from studies import (
    ROOT,
    Difference,
    Job,
    Point,
    Results,
    add_report_arguments,
    epochs_options,
    is_gpu_there,
    markdown_table,
    mean_and_deviation,
    merged,
    paired_difference,
    raise_failures,
    run_jobs,
    train,
    write_tables,
)

from mmorepa.cli import one_line_errors, positive
from mmorepa.engine.config import check_data_folders
from mmorepa.layers import OREPAKernel
from mmorepa.utils.files import atomic_write, check_outputs

KEY = ('data', 'network', 'block', 'variant', 'lr_factor', 'seed', 'epochs')
VALUES = (
    *('accuracy', 'lr', 'cpu_seconds', 'seconds', 'device', 'deployed_parameters'),
    # A point for each validation, epoch:accuracy:seconds:cpu_seconds.
    'curve',
)
METRIC = 'accuracy/top1'
# For the curves. Without those of every epoch, which would take a third of the time on
# a CPU: 1, 2, 4, 6, 8, 12, 16, 20.
VALIDATIONS = [(3, 2), (9, 4)]

DATA = {'10pct': '10 % of Fashion-MNIST', 'full': 'Fashion-MNIST'}
_SUFFIX = {'10pct': '1xb64_fashion-mnist-10pct', 'full': '1xb256_fashion-mnist'}
NETWORKS = {'resnet18': 'slim ResNet-18', 'repvgg-a0': 'slim RepVGG-A0'}
BLOCKS = {
    'resnet18': dict(none='plain', dbb='DBB', orepa='OREPA', repvgg='RepVGG'),
    'repvgg-a0': dict(none='plain', repvgg='RepVGG', orepa='OREPA-RepVGG'),
}
REFERENCE = 'none'
FACTORS = ('1/3', '1', '3')


class Variant(NamedTuple):
    """A change to a training.

    Args:
        text (str): What it is called in tables.
        options (dict): What to change in the config.
        networks (tuple[str, ...]): Those that it is for.
        blocks (tuple[str, ...]): Those that it is for.
        length (Fraction): Multiplies the epochs.
    """

    text: str
    options: dict
    networks: tuple[str, ...] = ('resnet18',)
    blocks: tuple[str, ...] = ('orepa',)
    length: Fraction = Fraction(1)

    def epochs(self, standard: int) -> int:
        """How long it trains, where the standard takes so many epochs."""
        return round(standard * self.length)


_PARAMWISE = 'optim_wrapper.paramwise_cfg'
_BLOCK_CFG = 'model.backbone.block_cfg'
_BRANCHES = tuple(OREPAKernel.INITIAL_SCALES)
_FROZEN = {f'{_PARAMWISE}.scale_lr_mult': 0.0}
_ALL_BLOCKS = ('none', 'dbb', 'orepa', 'repvgg')
STANDARD, LONGER = 'standard', 'longer'
KERNEL_DECAY, STRONG_DECAY = 'kernel_decay', 'strong_decay'
STRONG_KERNEL_DECAY = 'strong_kernel_decay'
# The recipe's 1e-4 takes half a percent off the weights in 1,880 steps, this a third.
STRONG = 0.01


def kernel_decay(coefficient: float) -> dict:
    """The options for weight decay of the folded kernels instead of the branches."""
    hook = dict(type='EquivalentKernelDecayHook', weight_decay=coefficient)
    return {'custom_hooks': [hook], f'{_PARAMWISE}.branch_decay_mult': 0.0}


VARIANTS = {
    STANDARD: Variant('', {}, tuple(NETWORKS), _ALL_BLOCKS),
    LONGER: Variant(
        '1.5 x the epochs', {}, tuple(NETWORKS), _ALL_BLOCKS, Fraction(3, 2)
    ),
    # Of a plain kernel, both are the same.
    KERNEL_DECAY: Variant(
        'weight decay of the folded kernels',
        kernel_decay(1e-4),
        tuple(NETWORKS),
        _ALL_BLOCKS[1:],
    ),
    STRONG_DECAY: Variant(
        'strong weight decay',
        {'optim_wrapper.optimizer.weight_decay': STRONG},
        tuple(NETWORKS),
        _ALL_BLOCKS,
    ),
    STRONG_KERNEL_DECAY: Variant(
        'strong weight decay of the folded kernels',
        {'optim_wrapper.optimizer.weight_decay': STRONG, **kernel_decay(STRONG)},
        tuple(NETWORKS),
        _ALL_BLOCKS[1:],
    ),
    'no_scaling': Variant(
        'no linear scaling (all scales are 1)',
        {**_FROZEN, _BLOCK_CFG: dict(initial_scales=dict.fromkeys(_BRANCHES, 1.0))},
    ),
    'frozen_scales': Variant('initial scales, not trained', _FROZEN),
    **{
        f'without_{branch}': Variant(
            f'without {branch}',
            {_BLOCK_CFG: dict(branches=[b for b in _BRANCHES if b != branch])},
        )
        for branch in _BRANCHES
    },
    'plain_stem': Variant('plain stem', {'model.backbone.block': 'orepa_plain_stem'}),
    'single_init': Variant(
        'single_init', {_BLOCK_CFG: dict(single_init=True)}, blocks=_ALL_BLOCKS[1:]
    ),
    **{
        f'stem_lr_{mult:g}': Variant(
            f'stem learning rate x {mult:g}', {f'{_PARAMWISE}.stem_lr_mult': mult}
        )
        for mult in (0.1, 0.3, 3.0)
    },
    'online': Variant('folded online', {'optim_wrapper.folded': False}),
}
DECAYS = (KERNEL_DECAY, STRONG_DECAY, STRONG_KERNEL_DECAY)
ABLATIONS = [name for name in VARIANTS if name not in (STANDARD, LONGER, *DECAYS)]


def seeds(text: str) -> list[int]:
    """``0-7`` or ``3``, as the type of an argument."""
    match = re.fullmatch(r'(\d+)(?:-(\d+))?', text)
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r} is neither like 3 nor like 0-7')
    first, last = int(match[1]), int(match[2] or match[1])
    return [*range(first, last + 1)]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Measures whether re-parameterised networks are better than plain '
        'ones. A stopped run goes on where it was.'
    )
    parser.add_argument('--data', nargs='+', choices=DATA, default=[*DATA])
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument(
        '--blocks',
        nargs='+',
        choices=_ALL_BLOCKS,
        default=[*_ALL_BLOCKS],
        help='a network goes without those that are not its own (default: all)',
    )
    parser.add_argument(
        '--lr-factors',
        nargs='+',
        choices=FACTORS,
        default=[*FACTORS],
        metavar='FACTOR',
        help="learning rates, in units of the recipe's: 1/3, 1 and 3 (default: all)",
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=(*VARIANTS, 'ablations'),
        default=[STANDARD],
        metavar='VARIANT',
        help=f'{", ".join(VARIANTS)}; ablations stands for all but the first five '
        '(default: standard)',
    )
    parser.add_argument(
        '--seeds', type=seeds, default=seeds('0-7'), help='like 0-7, the default'
    )
    parser.add_argument(
        '--epochs', type=positive, help='of each training (default: as in the config)'
    )
    parser.add_argument(
        '--workers',
        type=int,
        choices=(0, 1, 2),
        default=int(is_gpu_there()),
        help='processes that load the data of a training (default: 1 with a GPU, 0 '
        'without)',
    )
    parser.add_argument(
        '--merge',
        nargs='+',
        type=Path,
        default=[],
        metavar='CSV',
        help='take the rows of these files, too, such as those of other machines',
    )
    add_report_arguments(parser, 'accuracy', 'trainings, on a GPU too,', 'tables.md')
    args = parser.parse_args(argv)
    if 'ablations' in args.variants:
        names = [*args.variants, *ABLATIONS]
        args.variants = [name for name in VARIANTS if name in names]
    return args


def config_of(data: str, network: str) -> Path:
    """The config of the network; its blocks are an option."""
    name = f'{network}-slim_{_SUFFIX[data]}.py'
    return ROOT / 'configs/fashion_mnist' / name


@cache
def standard_epochs(data: str, given: Optional[int]) -> int:
    """How long trainings are, if nothing else is given: as the config says."""
    return given or merged(config_of(data, 'resnet18'), {}).train_cfg.max_epochs


def keys_of(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Those of all rows that are asked for.

    Seed by seed, so that a part of the study is one of fewer seeds, and blocks in turn,
    so that all of them meet the same machine.
    """
    for seed in args.seeds:
        for data in args.data:
            for network in args.networks:
                for name in args.variants:
                    variant = VARIANTS[name]
                    for factor in args.lr_factors:
                        for block in args.blocks:
                            if (
                                block in BLOCKS[network]
                                and block in variant.blocks
                                and network in variant.networks
                            ):
                                epochs = variant.epochs(
                                    standard_epochs(data, args.epochs)
                                )
                                parts = (data, network, block, name, factor)
                                parts = (*parts, str(seed), str(epochs))
                                yield dict(zip(KEY, parts))


def job_of(key: dict[str, str], workers: int, runs: Path) -> Job:
    """The training that gives a row."""

    def run() -> dict[str, str]:
        config = config_of(key['data'], key['network'])
        recipe = merged(config, {}).optim_wrapper.optimizer.lr
        lr = recipe * float(Fraction(key['lr_factor']))
        options = {
            **epochs_options(int(key['epochs']), workers),
            'model.backbone.block': key['block'],
            'optim_wrapper.optimizer.lr': lr,
            'randomness.seed': int(key['seed']),
            **VARIANTS[key['variant']].options,
        }
        if (key['variant'], key['lr_factor']) == (STANDARD, '1'):
            # The others are compared at their end alone.
            options['train_cfg.val_interval'] = 1
            options['train_cfg.dynamic_intervals'] = VALIDATIONS
        training = train(config, options, folder_of(key, runs), METRIC)
        return dict(
            accuracy=f'{training.metric:.2f}',
            lr=f'{lr:.4g}',
            cpu_seconds=f'{training.cpu_seconds:.1f}',
            seconds=f'{training.seconds:.1f}',
            device=training.device,
            deployed_parameters=str(training.deployed_parameters),
            curve=' '.join(
                f'{p.epoch}:{p.metric:.2f}:{p.seconds:.1f}:{p.cpu_seconds:.1f}'
                for p in training.curve
            ),
        )

    return Job(key, run)


def folder_of(key: dict[str, str], runs: Path) -> Path:
    """Where the training of a row leaves its logs and its last weights."""
    return runs / '-'.join(key[name] for name in KEY).replace('/', 'of')


def curve_of(row: dict[str, str]) -> list[Point]:
    """The validations of a row."""
    points = [point.split(':') for point in row['curve'].split()]
    return [Point(int(epoch), *map(float, rest)) for epoch, *rest in points]


def training_seconds(row: dict[str, str], point: Optional[Point] = None) -> float:
    """What the epochs of a row took, up to a point or in all.

    A CPU is often shared with other work, which the seconds of its cores leave out; a
    GPU has none.
    """
    point = point or curve_of(row)[-1]
    return point.cpu_seconds if row['device'] == 'cpu' else point.seconds


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
        self.rows = [
            row
            for row in results.rows
            if row['data'] == data
            and row['variant'] in VARIANTS
            and int(row['epochs']) == VARIANTS[row['variant']].epochs(epochs)
        ]

    def of(
        self, network: str, block: str, variant: str = STANDARD, factor: str = '1'
    ) -> dict[str, dict[str, str]]:
        """Rows by seed."""
        wanted = (network, block, variant, factor)
        names = KEY[1:5]
        return {
            row['seed']: row
            for row in self.rows
            if tuple(row[name] for name in names) == wanted
        }

    def best_factor(self, network: str, block: str) -> Optional[str]:
        """The learning rate of the highest mean; None if not all of them were tried."""
        means = {}
        for factor in FACTORS:
            found = accuracies(self.of(network, block, factor=factor))
            if not found:
                return None
            means[factor] = statistics.fmean(found.values())
        return max(means, key=means.get)


def accuracies(rows: dict[str, dict[str, str]]) -> dict[str, float]:
    """By seed."""
    return {seed: float(row['accuracy']) for seed, row in rows.items()}


def relative_time(
    rows: dict[str, dict[str, str]], reference: dict[str, dict[str, str]]
) -> Optional[float]:
    """The mean over seeds of ratios of training time, for seeds of one device."""
    ratios = [
        training_seconds(row) / training_seconds(reference[seed])
        for seed, row in rows.items()
        if seed in reference and row['device'] == reference[seed]['device']
    ]
    return statistics.fmean(ratios) if ratios else None


def _cell(value: object, form: str = '{}') -> str:
    return '' if value is None else form.format(value)


def _difference(
    rows: dict[str, dict[str, str]], reference: dict[str, dict[str, str]]
) -> Optional[Difference]:
    return paired_difference(accuracies(rows), accuracies(reference))


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
        if not found:
            continue
        is_plain = block == REFERENCE
        rows.append(
            (
                _names(network, block),
                mean_and_deviation([*accuracies(found).values()]),
                '' if is_plain else _cell(_difference(found, plain)),
                _cell(relative_time(found, plain), '{:.2f}'),
                f'{int(next(iter(found.values()))["deployed_parameters"]):,}',
                str(len(found)),
            )
        )
    headers = ('', 'top-1 accuracy (%)', 'minus plain', 'training time / plain')
    headers = (*headers, 'deployed parameters', 'seeds')
    return markdown_table(headers, rows) if rows else None


def rates_table(study: Study) -> Optional[str]:
    """Each block's best learning rate."""
    rows = []
    for network, block in _blocks():
        best = study.best_factor(network, block)
        if best is None:
            continue
        cells = []
        for factor in FACTORS:
            values = accuracies(study.of(network, block, factor=factor)).values()
            text = mean_and_deviation([*values])
            cells.append(f'**{text}**' if factor == best else text)
        plain_best = study.best_factor(network, REFERENCE)
        difference = None
        if block != REFERENCE and plain_best is not None:
            difference = _difference(
                study.of(network, block, factor=best),
                study.of(network, REFERENCE, factor=plain_best),
            )
        rows.append((_names(network, block), *cells, _cell(difference)))
    rates = [f'learning rate x {factor}' for factor in FACTORS]
    headers = ('top-1 accuracy (%)', *rates, 'best minus best plain')
    return markdown_table(headers, rows) if rows else None


def ablation_table(study: Study) -> Optional[str]:
    """Blocks without each of their parts, beside the whole and the plain network."""
    network, rows = 'resnet18', []
    plain = study.of(network, REFERENCE)
    for block, text in BLOCKS[network].items():
        found = {
            name: study.of(network, block, name) for name in (STANDARD, *ABLATIONS)
        }
        whole = found[STANDARD]
        found = {name: of_one for name, of_one in found.items() if of_one}
        for name, of_one in found.items() if len(found) > 1 else ():
            is_whole = name == STANDARD
            rows.append(
                (
                    text if is_whole else f'{text}, {VARIANTS[name].text}',
                    mean_and_deviation([*accuracies(of_one).values()]),
                    '' if is_whole else _cell(_difference(of_one, whole)),
                    _cell(_difference(of_one, plain)),
                    _cell(relative_time(of_one, whole), '{:.2f}'),
                    str(len(of_one)),
                )
            )
    headers = ('slim ResNet-18', 'top-1 accuracy (%)', 'minus the whole', 'minus plain')
    headers = (*headers, 'training time / the whole', 'seeds')
    return markdown_table(headers, rows) if rows else None


def budget_table(study: Study) -> Optional[str]:
    """OREPA beside trainings that take longer than it, or as long."""
    rows = []
    for network, blocks in BLOCKS.items():
        orepa, plain = study.of(network, 'orepa'), study.of(network, REFERENCE)
        for block in blocks:
            for name in (STANDARD, LONGER):
                found = study.of(network, block, name)
                if not found or not study.of(network, block, LONGER):
                    continue
                epochs = next(iter(found.values()))['epochs']
                is_orepa = (block, name) == ('orepa', STANDARD)
                rows.append(
                    (
                        f'{_names(network, block)}, {epochs} epochs',
                        mean_and_deviation([*accuracies(found).values()]),
                        _cell(relative_time(found, plain), '{:.2f}'),
                        '' if is_orepa else _cell(_difference(orepa, found)),
                        str(len(found)),
                    )
                )
    headers = ('', 'top-1 accuracy (%)', 'training time / plain', 'OREPA minus this')
    headers = (*headers, 'seeds')
    return markdown_table(headers, rows) if rows else None


TABLES: dict[str, Callable[[Study], Optional[str]]] = dict(
    main=main_table, rates=rates_table, budget=budget_table, ablations=ablation_table
)


def tables_of(results: Results, epochs: Optional[int] = None) -> dict[str, str]:
    """Markdown tables by name, like ``main-10pct``; those without rows are left out."""
    found = {
        f'{name}-{data}': make(Study(results, data, epochs))
        for data in DATA
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
    rows: dict[str, dict[str, str]]
    reference: dict[str, dict[str, str]]
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
            lines.append(Line('best learning rates', colour, rows, plain, False))
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
    for y, line in enumerate(lines):
        values, reference = accuracies(line.rows), accuracies(line.reference)
        found = paired_difference(values, reference)
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
    axes.set_yticks(range(len(lines)), [line.text for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(alpha=0.3, axis='x')


def plot_differences(
    studies: dict[str, Study],
    make: Callable[[Study], list[Line]],
    label: str,
    title: str,
    path: Path,
) -> None:
    """A panel for each data set that has something to draw."""
    panels = {data: make(study) for data, study in studies.items()}
    panels = {data: lines for data, lines in panels.items() if lines}
    if not panels:
        return
    height = 1.6 + 0.36 * max(map(len, panels.values()))
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(6.5, 5.2 * len(panels)), height),
        layout='constrained',
        squeeze=False,
    )
    for axes, (data, lines) in zip(all_axes[0], panels.items()):
        draw_differences(axes, lines)
        axes.set(title=DATA[data], xlabel=label)
    width = 80 * len(panels)
    figure.suptitle(textwrap.fill(title, width), fontsize='medium')
    _save(figure, path)


def plot_budget(studies: dict[str, Study], path: Path) -> None:
    """Accuracy over seconds of training, a curve for each block."""
    panels = [
        [(network, study) for network in NETWORKS if study.of(network, REFERENCE)]
        for study in studies.values()
    ]
    panels = [row for row in panels if row]
    if not panels:
        return
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
    title = 'Accuracy for the time spent: mean and standard deviation of the seeds.\n'
    title += 'Dotted: where plain ends.'
    if any(
        row['variant'] == LONGER for study in studies.values() for row in study.rows
    ):
        title += ' Rings: trainings of 1.5 x the epochs.'
    figure.suptitle(title, fontsize='medium')
    _save(figure, path)


def _mean_curve(rows: Sequence[dict[str, str]]) -> tuple[list, list, list]:
    """Seconds, accuracies and deviations, means over rows of the same epochs."""
    xs, means, deviations = [], [], []
    for points in zip(*map(curve_of, rows)):
        values = [point.metric for point in points]
        xs.append(statistics.fmean(map(training_seconds, rows, points)))
        means.append(statistics.fmean(values))
        deviations.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    return xs, means, deviations


def _draw_budget(axes: plt.Axes, study: Study, network: str) -> None:
    ends = []
    for block, text in BLOCKS[network].items():
        colour = COLOURS[block]
        rows = [*study.of(network, block).values()]
        if rows:
            xs, means, deviations = _mean_curve(rows)
            axes.plot(xs, means, marker='.', color=colour, label=text)
            axes.plot(xs[-1], means[-1], marker='o', color=colour)
            band = (
                [m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1)
            )
            axes.fill_between(xs, *band, color=colour, alpha=0.15, linewidth=0)
            ends.append(means[-1])
            if block == REFERENCE:
                axes.axvline(xs[-1], color=colour, linestyle=':', linewidth=1)
                _name_budget(axes, network, rows[0])
        longer = [*study.of(network, block, LONGER).values()]
        if longer:
            xs, means, _ = _mean_curve(longer)
            style = dict(marker='o', markersize=8, markerfacecolor='none')
            axes.plot(xs[-1], means[-1], color=colour, **style)
            ends.append(means[-1])
    # The first epochs would take all of the height.
    reach = max(max(ends) - min(ends), 1.0)
    axes.set_ylim(min(ends) - 5 * reach, max(ends) + 0.8 * reach)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')


def _name_budget(axes: plt.Axes, network: str, row: dict[str, str]) -> None:
    unit = (
        ', of one core' if row['device'] == 'cpu' else f' on a shared {row["device"]}'
    )
    axes.set(
        title=f'{NETWORKS[network]}, {DATA[row["data"]]}',
        xlabel=f'seconds of training{unit}',
        ylabel='top-1 accuracy (%)',
    )


def _save(figure: plt.Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


FIGURES = dict(
    differences='Differences to plain, seed by seed, with their means and intervals',
    ablations='Differences to OREPA without its parts',
    budget='Accuracy over seconds of training',
)


def report(results: Results, args: argparse.Namespace) -> None:
    """Writes tables and figures of all rows."""
    studies = {data: Study(results, data, args.epochs) for data in DATA}
    plot_differences(
        studies,
        block_lines,
        '← worse     points of accuracy beyond plain     better →',
        'Each seed, and the mean with its 95 % interval: one recipe for all (dots), '
        'the best of three learning rates for each (squares)',
        args.out / 'differences.png',
    )
    plot_differences(
        studies,
        ablation_lines,
        '← worse     points of accuracy beyond OREPA     better →',
        'OREPA without its parts: each seed, and the mean with its 95 % interval',
        args.out / 'ablations.png',
    )
    plot_budget(studies, args.out / 'budget.png')
    figures = {
        name: (args.out / f'{name}.png', caption) for name, caption in FIGURES.items()
    }
    tables = tables_of(results, args.epochs)
    write_tables(tables, figures, args.out / 'tables.md', args.document)
    print(f"Wrote tables to '{args.document or args.out}', figures to '{args.out}'.")


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    names = ('results.csv', 'tables.md', 'differences.png', 'ablations.png')
    outputs = [args.out / name for name in (*names, 'budget.png')]
    check_outputs([*outputs, args.document], args.merge)
    results = Results(args.out / 'results.csv', KEY, VALUES)
    for path in args.merge:
        if not path.is_file():
            raise FileNotFoundError(f"no results at '{path}'")
        print(f"{results.merge(path)} rows are new in '{path}'.")
    failures = []
    if not args.report_only:
        jobs = [job_of(key, args.workers, args.out / 'runs') for key in keys_of(args)]
        if not jobs:
            raise ValueError('these blocks and variants do not go together')
        for data in args.data:
            config = merged(config_of(data, args.networks[0]), {})
            check_data_folders(config, ('train', 'val'))
        failures = run_jobs(
            jobs, results, args.jobs, shown=('accuracy', 'seconds', 'device')
        )
    if results.rows:
        report(results, args)
    raise_failures(failures)
    results.require_rows()


if __name__ == '__main__':
    main()
