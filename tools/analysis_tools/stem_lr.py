"""Measures how fast the deep linear stem learns, and suggests stem_lr_mult.

For a kernel W = fold(theta), one SGD step on theta moves W by -lr * J * J^T * G, where
J is the Jacobian of the fold and G the gradient with respect to W; a plain conv moves
by -lr * G. The amplification, <G, J J^T G> / <G, G>, says how much further that is.

BatchNorm undoes the scale of W, and so what the network sees of a step is its size
relative to W. The relative amplification, divided by the mean of |W_o|^2 over output
channels, compares these.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
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
from mmorepa.cli import add_config_options, one_line_errors, positive
from mmorepa.converters import load_training_form, read_checkpoint
from mmorepa.engine.config import check_data_folders, read_config
from mmorepa.layers import DeepLinearKernel, PlainKernel
from mmorepa.utils.errors import CheckpointError
from mmorepa.utils.files import atomic_write, check_outputs
from mmorepa.utils.tables import format_table


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        help='use the gradients of so many training batches instead, for which the '
        'checkpoint has to be that of the whole model',
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


def build(cfg: Config, checkpoint: str, whole: bool) -> nn.Module:
    """The model with the weights of the checkpoint, or one with just its backbone."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if whole:
        if 'data_preprocessor' in cfg:  # The runner hands it on in the same way.
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
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
    if not whole:
        state = {k: v for k, v in state.items() if k.startswith('backbone.')}
    load_training_form(model, state)
    return model


def training_batches(cfg: Config, number: int) -> list:
    """The first batches of the training data."""
    check_data_folders(cfg, ('train',))
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    if cfg.get('default_scope') == 'mmpretrain':
        loader.setdefault('collate_fn', dict(type='default_collate'))
    return list(itertools.islice(Runner.build_dataloader(loader, seed=0), number))


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
    """Statistics by group of convs, and the suggested multipliers."""
    groups: dict[str, list[LayerAmplification]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer), []).append(layer)
    others = [layer for layer in layers if not layer.is_stem]
    stem = groups['stem']
    figures = dict(groups={}, multipliers={})
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
    for kind in ('amplification', 'relative'):
        figures['multipliers'][kind] = median(
            getattr(layer, kind) for layer in others
        ) / median(getattr(layer, kind) for layer in stem)
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
    styles = (('amplification', 'tab:blue', 'o'), ('relative', 'tab:orange', 's'))
    for kind, colour, marker in styles:
        values = [getattr(layer, kind) for layer in layers]
        label = kind if kind == 'amplification' else 'relative to $|W_o|^2$'
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
    for name, kernel in kernels.items():
        weights = kernel.double().flatten()
        # In units of the standard deviation: the shapes are what is compared.
        right.hist(
            (weights / weights.std()).numpy(),
            bins=[x / 4 for x in range(-40, 41)],
            density=True,
            histtype='step',
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
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


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
    multipliers = figures['multipliers']
    print(
        '\nA multiplier of the stem that gives it the median of the other convs:\n'
        f'  stem_lr_mult={multipliers["amplification"]:.2g} for steps of the kernel,\n'
        f'  stem_lr_mult={multipliers["relative"]:.2g} for steps relative to the '
        'kernel, which is what\n  counts where a BatchNorm follows.'
    )


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
    model = build(cfg, args.checkpoint, whole=args.batches > 0)
    stem = next(
        conv
        for name, conv in folded_convs(model.backbone)
        if name.split('.')[0] == 'stem'
    )
    gradients = None
    if args.batches:
        gradients = kernel_gradients(model, training_batches(cfg, args.batches))
    layers = backbone_amplifications(model.backbone, args.draws, gradients)
    kernels = kernels_to_compare(stem, plain_stem(cfg, stem, args.plain_checkpoint))
    figures = summarize(layers)
    figures['weights'] = {
        name: distribution(kernel)._asdict() for name, kernel in kernels.items()
    }
    figures['layers'] = [layer._asdict() for layer in layers]
    show(figures)
    plot(layers, kernels, args.out)
    if args.json:
        write_json(figures, args.json)
    print(f'Wrote {args.out}.')
    return figures


if __name__ == '__main__':
    main()
