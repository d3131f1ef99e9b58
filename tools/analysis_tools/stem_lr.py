"""Measures how fast the deep linear stem learns, and suggests stem_lr_mult.

For a kernel W = fold(theta), one SGD step on theta moves W by -lr * J * J^T * G, where
J is the Jacobian of the fold and G the gradient with respect to W; a plain conv moves
by -lr * G. The amplification, <G, J J^T G> / <G, G>, says how much further that is.

BatchNorm undoes the scale of each output channel of W. The relative amplification,
|J^T G|^2 / sum_o |W_o|^2 |G_o|^2, is the amplification of what the network sees: the
effective learning rate of the normalised kernel over that of the optimizer.

The suggested multiplier gives the stem the median of the other convs. It depends on the
gradients, so it is the geometric mean over batches of the training data (--batches),
and is given if it is certain to within a factor of 1.25. As many batches are used as
that takes.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean, median, stdev
from typing import NamedTuple, Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_config_options, positive


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(
        __doc__, 'my_config.py work_dirs/my_config/epoch_30.pth --batches 64'
    )
    parser.add_argument('config', help='a config with a backbone of this package')
    parser.add_argument(
        'checkpoint',
        help="a training checkpoint with this backbone, or 'none' for initial weights",
    )
    parser.add_argument(
        '--plain-checkpoint',
        help='a training checkpoint of the plain twin, whose stem is drawn for '
        'comparison; by default a plain stem with its initial weights',
    )
    parser.add_argument(
        '--draws',
        type=positive,
        default=4,
        help='random gradients for each conv (default: 4)',
    )
    parser.add_argument(
        '--batches',
        type=int,
        default=0,
        help='use the gradients of at most so many training batches instead, 64 for '
        'instance; without them there is no suggestion',
    )
    parser.add_argument(
        '--out', type=Path, default=Path('stem_lr.png'), help='the PNG to write'
    )
    parser.add_argument('--json', type=Path, help='a file for the figures')
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.batches < 0:
        parser.error('--batches is at least 0')
    return args


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import matplotlib.pyplot as plt
from charts import SERIES, save
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

from mmorepa.analysis import (
    LayerAmplification,
    backbone_amplifications,
    distribution,
    folded_convs,
    kernel_gradients,
)
from mmorepa.backbones import StagedBackbone
from mmorepa.cli import one_line_errors
from mmorepa.converters import load_training_form, read_checkpoint
from mmorepa.engine.config import check_data_folders, read_config
from mmorepa.engine.seeding import seeded
from mmorepa.layers import DeepLinearKernel, PlainKernel
from mmorepa.utils.errors import CheckpointError
from mmorepa.utils.files import atomic_write, check_outputs
from mmorepa.utils.tables import format_table

SEED = 0
# A multiplier is given if its interval is within this factor, from so many batches.
CERTAINTY, LEAST = 1.25, 8
# Student's, of 95 % for so many; for more batches it is on the safe side.
QUANTILE = 2.36


def build(cfg: Config, checkpoint: str, whole: bool) -> nn.Module:
    """The model with the weights of the checkpoint, or one with just its backbone.

    A whole model may come with the checkpoint of another one, whose backbone it
    continues: its head then has initial weights, as in the fine-tuning.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if whole:
        if 'data_preprocessor' in cfg:  # The runner hands it on in the same way.
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        cfg.model.backbone.init_cfg = None
        model = MODELS.build(cfg.model)
    else:
        model = nn.Module()
        model.backbone = MODELS.build(cfg.model.backbone)
    if not isinstance(model.backbone, StagedBackbone):
        raise ValueError(
            f'the backbone is a {type(model.backbone).__name__}, none of this '
            "package's, and has no stem that this tool knows"
        )
    if checkpoint == 'none':
        return model
    state = read_checkpoint(checkpoint)['state_dict']
    others = {k: v.shape for k, v in model.state_dict().items() if _is_of_head(k)}
    if whole and others == {k: v.shape for k, v in state.items() if _is_of_head(k)}:
        load_training_form(model, state)
        return model
    if whole:
        print('The checkpoint is of another model: all but its backbone is initial.')
        model.init_weights()
    start = 'backbone.'
    state = {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}
    load_training_form(model.backbone, state)
    return model


def _is_of_head(key: str) -> bool:
    return not key.startswith('backbone.')


def training_batches(cfg: Config) -> Iterator:
    """Endless batches of the training data."""
    check_data_folders(cfg, ('train',))
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    if cfg.get('default_scope') == 'mmpretrain':
        loader.setdefault('collate_fn', dict(type='default_collate'))
    loader = Runner.build_dataloader(loader, seed=SEED)
    while True:
        yield from loader


class Advice(NamedTuple):
    """A multiplier of the stem's learning rate.

    Args:
        value (float): The geometric mean over batches.
        low (float): The lower end of its 95 % confidence interval.
        high (float): The upper end.
        each (list[float]): What each batch says.
    """

    value: float
    low: float
    high: float
    each: list[float]

    @property
    def is_settled(self) -> bool:
        """Whether it is certain enough to be given."""
        return len(self.each) >= LEAST and self.high <= self.value * CERTAINTY


def advise(each: Sequence[float]) -> Advice:
    """The mean of the logarithms: each batch counts the same."""
    logs = [math.log(value) for value in each]
    value, factor = math.exp(fmean(logs)), math.inf
    if len(each) > 1:
        factor = math.exp(min(700, QUANTILE * stdev(logs) / len(each) ** 0.5))
    return Advice(value, value / factor, value * factor, [*each])


def multiplier(layers: Sequence[LayerAmplification]) -> float:
    """What gives the stem the relative amplification of the other convs' median."""
    stem = [layer.relative for layer in layers if layer.is_stem]
    others = [layer.relative for layer in layers if not layer.is_stem]
    return median(others) / median(stem)


def measure_batches(
    model: nn.Module, cfg: Config, most: int
) -> tuple[list[LayerAmplification], list[float]]:
    """Amplifications over so many batches that the multiplier is settled.

    Returns:
        tuple[list[LayerAmplification], list[float]]: Geometric means over the
        batches, and the multiplier of each.
    """
    found: list[list[LayerAmplification]] = []
    each: list[float] = []
    # The same data whenever it is asked: augmentations are random.
    with seeded(SEED):
        batches = itertools.islice(training_batches(cfg), most)
        for i, gradients in enumerate(kernel_gradients(model, batches), 1):
            lists = {name: [gradient] for name, gradient in gradients.items()}
            try:
                layers = backbone_amplifications(model.backbone, 0, lists)
            except ValueError:
                continue  # A batch that is learned to the last digit says nothing.
            found.append(layers)
            each.append(multiplier(layers))
            if i % 8 == 0:
                advice = advise(each)
                print(
                    f'{i} of at most {most} batches: {advice.value:.2g}, '
                    f'{advice.low:.2g} to {advice.high:.2g}',
                    flush=True,
                )
                if advice.is_settled:
                    break
    if not each:
        raise ValueError(
            'the gradients of all batches are zero: the network has nothing left to '
            'learn from these data'
        )
    layers = [
        layers[0]._replace(
            amplification=geometric_mean(layer.amplification for layer in layers),
            relative=geometric_mean(layer.relative for layer in layers),
            each=tuple(layer.relative for layer in layers),
        )
        for layers in zip(*found)
    ]
    return layers, each


def plain_stem(cfg: Config, stem: nn.Module, checkpoint: Optional[str]) -> Tensor:
    """The kernel of a plain stem of the same shape, trained or initial."""
    if checkpoint is None:
        shape = (stem.out_channels, stem.in_channels // stem.groups)
        return PlainKernel(*shape, stem.kernel_size[0])()
    state = read_checkpoint(checkpoint)['state_dict']
    key = 'backbone.stem.branches.weight'
    if key not in state:
        raise CheckpointError(
            f'{checkpoint!r} has no {key}: it is no training checkpoint of a network '
            "with block='plain'"
        )
    return state[key]


def group_of(layer: LayerAmplification) -> str:
    """The row of the table that a conv belongs to."""
    if layer.is_stem:
        return 'stem'
    kind = 'plain' if layer.is_plain else 'folded'
    return f'{kind} {layer.kernel_size}x{layer.kernel_size}'


def summarize(layers: Sequence[LayerAmplification]) -> dict:
    """Statistics by group of convs."""
    groups: dict[str, list[LayerAmplification]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer), []).append(layer)
    figures = dict(groups={})
    for name, members in groups.items():
        figures['groups'][name] = dict(
            convs=len(members),
            **{
                kind: dict(
                    median=median(values), smallest=min(values), largest=max(values)
                )
                for kind, values in (
                    (kind, [getattr(layer, kind) for layer in members])
                    for kind in ('amplification', 'relative')
                )
            },
        )
    return figures


def kernels_to_compare(stem: nn.Module, plain: Tensor) -> dict[str, Tensor]:
    """The stem's factors if it has any, what they make, and a plain stem."""
    kernels = {}
    if isinstance(stem.branches, DeepLinearKernel):
        for i, factor in enumerate(stem.branches.factors):
            kernels[f'factor {i + 1}'] = factor().detach()
    kernels['folded stem'] = stem.kernel().detach()
    kernels['plain stem'] = plain.detach()
    return kernels


def plot(
    layers: Sequence[LayerAmplification], kernels: dict[str, Tensor], path: Path
) -> None:
    """Draws the amplifications by layer, and the histograms of the stem's weights."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    styles = (('amplification', SERIES[1], 'o'), ('relative', SERIES[2], 's'))
    for kind, colour, marker in styles:
        values = [getattr(layer, kind) for layer in layers]
        label = kind if kind == 'amplification' else 'relative amplification'
        left.plot(values, marker, color=colour, markersize=4, label=label)
        stems = [(i, v) for i, v in enumerate(values) if layers[i].is_stem]
        left.plot(
            *zip(*stems), marker, color=colour, markersize=9, markeredgecolor='black'
        )
    left.axhline(1, color='grey', linestyle='--', label='a plain conv')
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(
        title='Amplification of a step (the stem is outlined)',
        xlabel='conv, in the order of the network',
        yscale='log',
    )
    left.legend()
    for colour, (name, kernel) in zip(SERIES, kernels.items()):
        weights = kernel.double().flatten()
        # In units of the standard deviation: the shapes are what is compared.
        right.hist(
            (weights / weights.std()).numpy(),
            bins=[x / 4 for x in range(-40, 41)],
            density=True,
            histtype='step',
            color=colour,
            linewidth=2 if 'stem' in name else 1,
            label=f'{name}, std {weights.std():.2g}',
        )
    right.set(
        title='Weights of the stem, each over its std',
        xlabel='standard deviations',
        ylabel='density',
        yscale='log',
    )
    right.legend(fontsize='small')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, path)


def show(figures: dict) -> None:
    """Prints the tables."""

    def cell(values: dict) -> str:
        if values['smallest'] == values['largest']:
            return f'{values["median"]:.3g}'
        return (
            f'{values["median"]:.3g} '
            f'({values["smallest"]:.3g} to {values["largest"]:.3g})'
        )

    headers = ('convs', 'number', 'amplification', 'relative amplification')
    rows = [
        (name, str(v['convs']), cell(v['amplification']), cell(v['relative']))
        for name, v in figures['groups'].items()
    ]
    print('\nMedian (and range) of how far a step moves a kernel; a plain conv has 1:')
    print(format_table(headers, rows))
    headers = ('weights', 'std', 'excess kurtosis', 'largest')
    rows = [
        (name, f'{v["std"]:.4g}', f'{v["kurtosis"]:.2f}', f'{v["largest"]:.3g}')
        for name, v in figures['weights'].items()
    ]
    print()
    print(format_table(headers, rows))


def show_advice(advice: Optional[Advice], has_chain: bool) -> None:
    """Prints a number, or that there is none."""
    if not has_chain:
        print('\nThe stem is no deep linear one: it needs no stem_lr_mult.')
        return
    if advice is None:
        print(
            '\nstem_lr_mult: cannot say from random gradients, and those of the data '
            'may be other ones; give --batches 64.'
        )
        return
    number = len(advice.each)
    spread = (
        f'95 % interval {advice.low:.2g} to {advice.high:.2g} from {number} batches; '
        f'single ones say {min(advice.each):.2g} to {max(advice.each):.2g}'
    )
    if advice.is_settled:
        print(f'\nstem_lr_mult={advice.value:.2g} ({spread})')
    else:
        print(f'\nstem_lr_mult: cannot say ({spread}); more --batches may settle it.')


def write_json(figures: dict, path: Path) -> None:
    """Writes the file, and the folder that it is in."""
    with atomic_write(path) as file:
        file.write_text(json.dumps(figures, indent=2) + '\n')


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    inputs = [args.config, args.checkpoint, args.plain_checkpoint]
    check_outputs([args.out, args.json], inputs)
    cfg = read_config(args.config, args.cfg_options)
    with seeded(SEED):  # Initial weights, where some are.
        model = build(cfg, args.checkpoint, whole=args.batches > 0)
    stem = next(
        conv
        for name, conv in folded_convs(model.backbone)
        if name.split('.')[0] == 'stem'
    )
    has_chain = isinstance(stem.branches, DeepLinearKernel)
    advice = None
    if args.batches:
        layers, each = measure_batches(model, cfg, args.batches)
        advice = advise(each) if has_chain else None
    else:
        layers = backbone_amplifications(model.backbone, args.draws)
    kernels = kernels_to_compare(stem, plain_stem(cfg, stem, args.plain_checkpoint))
    figures = summarize(layers)
    figures['weights'] = {
        name: distribution(kernel)._asdict() for name, kernel in kernels.items()
    }
    figures['layers'] = [layer._asdict() for layer in layers]
    figures['advice'] = advice and dict(advice._asdict(), is_settled=advice.is_settled)
    show(figures)
    show_advice(advice, has_chain)
    plot(layers, kernels, args.out)
    if args.json:
        write_json(figures, args.json)
    print(f'Wrote {args.out}.')
    return figures


if __name__ == '__main__':
    main()
