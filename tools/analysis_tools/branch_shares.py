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
import pandas as pd
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

COLUMNS = 12


def measure(layers: Sequence[BranchKernels]) -> pd.DataFrame:
    """A row for each branch of each layer."""
    rows = []
    for layer in layers:
        for branch, share in shares(layer.kernels).items():
            scales = pd.Series(layer.scales[branch].abs().numpy())
            rows.append(
                dict(
                    layer=layer.name,
                    branch=branch,
                    **share._asdict(),
                    scale_median=scales.median(),
                    scale_10_percent=scales.quantile(0.1),
                    scale_90_percent=scales.quantile(0.9),
                )
            )
    return pd.DataFrame(rows)


def plot(rows: pd.DataFrame, path: Path) -> None:
    """Both shares and the scales over depth, one below the other."""
    layers, names = rows.layer.unique(), branch_names(rows.branch)
    tables = {
        key: rows.pivot(index='layer', columns='branch', values=key).loc[layers, names]
        for key in rows.columns[2:]
    }
    figure, (sizes, projections, scales) = plt.subplots(
        3,
        1,
        figsize=(max(9, 0.3 * len(layers) + 4), 10),
        sharex=True,
        layout='constrained',
    )
    style = dict(color=[colour_of(name) for name in names], legend=False)
    tables['size'].plot.bar(ax=sizes, stacked=True, width=0.85, **style)
    tables['projection'].plot(ax=projections, marker='o', ms=4, **style)
    x, middle = np.arange(len(layers)), tables['scale_median']
    below = middle - tables['scale_10_percent']
    above = tables['scale_90_percent'] - middle
    for i, name in enumerate(names):
        # Side by side, so that they do not hide one another.
        shifted = x + 0.6 * ((i + 0.5) / len(names) - 0.5)
        spread = (below[name], above[name])
        mark = dict(fmt='o', ms=4, color=colour_of(name))
        scales.errorbar(shifted, middle[name], spread, **mark)
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
    label_layers(scales, layers)
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
    is_colour = first.shape[1] == 3
    kind = 'colours (grey: zero)' if is_colour else 'first input channel (white: zero)'
    above.suptitle(f'{title}, {kind}')
    for axes, kernel in zip(_blank(above, lines[0]), first):
        _image(axes, kernel)
    below.suptitle('Root mean square of each tap (yellow: the strongest of the layer)')
    for axes, (name, kernel) in zip(_blank(below, lines[1]), kernels.items()):
        strength = kernel.square().mean(dim=(0, 1)).sqrt()
        axes.imshow(strength.numpy(), cmap='viridis', vmin=0)
        axes.set_title(short(name), fontsize=7)
    save(figure, path)


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


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    numbers = args.out.with_suffix('.csv')
    images = args.out.with_name(f'{args.out.stem}_kernels.png')
    model, layers = load_model(args, [args.out, numbers, images])
    rows = measure(layers)
    print('Means over the layers:')
    means = rows.groupby('branch', sort=False)[['size', 'projection', 'scale_median']]
    print(means.mean().to_string(float_format='{:.3f}'.format))
    plot(rows, args.out)
    plot_kernels(folded_kernels(model), images)
    write_csv(rows.to_dict('records'), numbers)
    print(f'Wrote {args.out}, {images} and {numbers}.')


if __name__ == '__main__':
    main()
