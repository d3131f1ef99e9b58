"""Draws how much each branch puts into the folded kernels, and these kernels.

The folded kernel K of a layer is the sum of its branches' kernels K_b, each with its
scale and its BatchNorms. Two shares say what a branch puts in. All output channels
count the same, and each share adds up to 1:

- size, |K_b| / sum of all |K_c|: its part of what is added up
- projection, <K_b, K> / <K, K>: its part of what comes out; that of a branch which
  the others cancel is near 0, or negative
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_model_arguments


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'my_config.py work_dirs/my_config/epoch_30.pth')
    also = ', and images of the folded kernels as ..._kernels.png'
    add_model_arguments(parser, 'branch_shares.png', also)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import matplotlib.pyplot as plt
import numpy as np
from charts import (
    branch_names,
    colour_of,
    label_layers,
    load_model,
    save,
    short,
    write_csv,
)
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor, nn

from mmorepa.analysis import BranchKernels, shares
from mmorepa.cli import one_line_errors
from mmorepa.layers import outermost
from mmorepa.utils.tables import format_table

COLUMNS = 12


def measure(layers: Sequence[BranchKernels]) -> list[dict]:
    """A row for each branch of each layer."""
    rows = []
    for layer in layers:
        for branch, share in shares(layer.kernels).items():
            scale = layer.scales[branch].abs()
            low, middle, high = np.quantile(scale.numpy(), [0.1, 0.5, 0.9])
            rows.append(
                dict(
                    layer=layer.name,
                    branch=branch,
                    size=share.size,
                    projection=share.projection,
                    scale_median=float(middle),
                    scale_10_percent=float(low),
                    scale_90_percent=float(high),
                )
            )
    return rows


def plot(layers: Sequence[BranchKernels], rows: Sequence[dict], path: Path) -> None:
    """Both shares and the scales over depth, one below the other."""
    figure, (sizes, projections, scales) = plt.subplots(
        3,
        1,
        figsize=(max(9, 0.3 * len(layers) + 4), 10),
        sharex=True,
        layout='constrained',
    )
    places = {layer.name: i for i, layer in enumerate(layers)}
    bottoms = np.zeros(len(layers))
    names = branch_names(layers)
    for i, name in enumerate(names):
        own = [row for row in rows if row['branch'] == name]
        x = np.array([places[row['layer']] for row in own])
        heights = np.array([row['size'] for row in own])
        style = dict(color=colour_of(name), label=name)
        sizes.bar(x, heights, 0.85, bottoms[x], **style)
        bottoms[x] += heights
        projections.plot(x, [row['projection'] for row in own], 'o-', ms=4, **style)
        # Side by side, so that they do not hide one another.
        shifted = x + 0.6 * ((i + 0.5) / len(names) - 0.5)
        middle = np.array([row['scale_median'] for row in own])
        low, high = (
            np.array([row[f'scale_{percent}_percent'] for row in own])
            for percent in (10, 90)
        )
        scales.errorbar(
            shifted, middle, (middle - low, high - middle), fmt='o', ms=4, **style
        )
    sizes.set(
        title='Size: each branch as a part of all that is added up',
        ylabel='share of the norms',
        ylim=(0, 1),
    )
    projections.axhline(0, color='grey', linewidth=0.8)
    projections.set(
        title='Projection: its part of the kernel that comes out',
        ylabel='share of the folded kernel',
    )
    scales.set(
        title='Scales: the median |scale| of the output channels, and 10 to 90 % of '
        'them',
        ylabel='|scale| (linear below 0.1)',
    )
    scales.set_yscale('symlog', linthresh=0.1)
    scales.set_ylim(bottom=0)
    scales.yaxis.set_major_formatter('{x:g}')
    for axes in (projections, scales):
        axes.grid(alpha=0.3)
    label_layers(scales, [layer.name for layer in layers])
    figure.align_ylabels()
    handles, labels = sizes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=len(names))
    save(figure, path)


def folded_kernels(model: nn.Module) -> dict[str, Tensor]:
    """Those of the convs larger than 1×1, by name, as they are deployed."""
    return {
        name: conv.equivalent_kernel_bias()[0]
        for name, conv in outermost(model)
        if conv.kernel_size[0] > 1
    }


def plot_kernels(kernels: dict[str, Tensor], path: Path) -> None:
    """The first layer's kernels, and the strength of each tap in every layer."""
    name, first = next(iter(kernels.items()))
    # By strength: the first ones say most.
    order = first.flatten(1).norm(dim=1).argsort(descending=True)
    first = first[order[: 3 * COLUMNS]]
    lines = [-(-len(items) // COLUMNS) for items in (first, kernels)]
    heights = 1.05 * lines[0] + 0.4, 1.25 * lines[1] + 0.4
    figure = plt.figure(figsize=(12, sum(heights)), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    title = f'The {len(first)} strongest kernels of {short(name)}'
    above.suptitle(f'{title}, {_kind(first)}')
    for axes, kernel in zip(_blank(above, lines[0]), first):
        _image(axes, kernel)
    below.suptitle('Root mean square of each tap (yellow: the strongest of the layer)')
    for axes, (name, kernel) in zip(_blank(below, lines[1]), kernels.items()):
        strength = kernel.square().mean(dim=(0, 1)).sqrt()
        axes.imshow(strength.numpy(), cmap='viridis', vmin=0)
        axes.set_title(short(name), fontsize=7)
    save(figure, path)


def _kind(kernels: Tensor) -> str:
    if kernels.shape[1] == 3:
        return 'as colours (grey: zero)'
    return 'the first input channel (white: zero)'


def _blank(figure: SubFigure, lines: int) -> Sequence[Axes]:
    grid = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    return grid.flat


def _image(axes: Axes, kernel: Tensor) -> None:
    """Each kernel over its own largest weight."""
    kernel = kernel / kernel.abs().max().clamp_min(1e-12)
    if len(kernel) == 3:
        axes.imshow((0.5 + 0.5 * kernel.permute(1, 2, 0)).numpy())
    else:
        axes.imshow(kernel[0].numpy(), cmap='PuOr_r', vmin=-1, vmax=1)


def show(rows: Sequence[dict]) -> None:
    """Prints the mean over all layers."""
    table = []
    for name in dict.fromkeys(row['branch'] for row in rows):
        own = [row for row in rows if row['branch'] == name]
        means = (
            np.mean([row[k] for row in own])
            for k in ('size', 'projection', 'scale_median')
        )
        table.append((name, str(len(own)), *(f'{mean:.3f}' for mean in means)))
    print('Means over the layers:')
    headers = ('branch', 'layers', 'size share', 'projection share', '|scale|')
    print(format_table(headers, table))


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> list[dict]:
    args = parse_args(argv)
    numbers = args.out.with_suffix('.csv')
    images = args.out.with_name(f'{args.out.stem}_kernels.png')
    model, layers = load_model(args, [args.out, numbers, images])
    rows = measure(layers)
    show(rows)
    plot(layers, rows, args.out)
    plot_kernels(folded_kernels(model), images)
    write_csv(rows, numbers)
    print(f'Wrote {args.out}, {images} and {numbers}.')
    return rows


if __name__ == '__main__':
    main()
