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
from start import model_parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    also = ', and images of the folded kernels as ..._kernels.png'
    return model_parser(__doc__, 'branch_shares.png', also).parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import charts
import numpy as np
import pandas as pd
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
    layers, names = rows.layer.unique(), charts.branch_names(rows.branch)
    tables = {
        key: rows.pivot(index='layer', columns='branch', values=key).loc[layers, names]
        for key in rows.columns[2:]
    }
    figure, grid = charts.panels(3, 1, max(9, 0.3 * len(layers) + 4), 10, sharex=True)
    sizes, projections, scales = grid[:, 0]
    style = dict(color=[charts.colour_of(name) for name in names], legend=False)
    tables['size'].plot.bar(ax=sizes, stacked=True, width=0.85, **style)
    tables['projection'].plot(ax=projections, marker='o', ms=4, **style)
    x, middle = np.arange(len(layers)), tables['scale_median']
    below = middle - tables['scale_10_percent']
    above = tables['scale_90_percent'] - middle
    for i, name in enumerate(names):
        # Side by side, so that they do not hide one another.
        shifted = x + 0.6 * ((i + 0.5) / len(names) - 0.5)
        spread = (below[name], above[name])
        mark = dict(fmt='o', ms=4, color=charts.colour_of(name))
        scales.errorbar(shifted, middle[name], spread, **mark)
    sizes.set_title('Size: each branch as a part of all that is added up')
    sizes.set(ylabel='share of the norms', ylim=(0, 1))
    projections.axhline(0, color='grey', linewidth=0.8)
    projections.set_title('Projection: its part of the kernel that comes out')
    projections.set_ylabel('share of the folded kernel')
    title = 'Scales: the median |scale| of the output channels, and 10 to 90 % of them'
    scales.set(title=title, ylabel='|scale| (linear below 0.1)')
    scales.set_yscale('symlog', linthresh=0.1)
    scales.set_ylim(bottom=0)
    scales.yaxis.set_major_formatter('{x:g}')
    for axes in (projections, scales):
        axes.grid(alpha=0.3)
    charts.label_layers(scales, layers)
    figure.align_ylabels()
    handles, labels = sizes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=len(names))
    charts.save(figure, path)


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
    above, below = (-(-len(items) // COLUMNS) for items in (first, kernels))
    figure, grid = charts.panels(above + below, COLUMNS, 12, 1.2 * (above + below) + 1)
    for axes in grid.flat:
        axes.axis('off')
    is_colour = first.shape[1] == 3
    for axes, kernel in zip(grid.flat, first):
        # Each over its own largest weight.
        kernel = (kernel / kernel.abs().max().clamp_min(1e-12)).numpy()
        if is_colour:
            axes.imshow(0.5 + 0.5 * kernel.transpose(1, 2, 0))
        else:
            axes.imshow(kernel[0], cmap='PuOr_r', vmin=-1, vmax=1)
    for axes, (layer, kernel) in zip(grid[above:].flat, kernels.items()):
        strength = kernel.square().mean(dim=(0, 1)).sqrt()
        axes.imshow(strength.numpy(), cmap='viridis', vmin=0)
        axes.set_title(charts.short(layer), fontsize=7)
    kind = 'colours (grey: zero)' if is_colour else 'first input channel (white: zero)'
    figure.suptitle(
        f'Above: the {len(first)} strongest kernels of {charts.short(name)}, {kind}\n'
        'Below: root mean square of each tap (yellow: the strongest of the layer)'
    )
    charts.save(figure, path)


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    numbers = args.out.with_suffix('.csv')
    images = args.out.with_name(f'{args.out.stem}_kernels.png')
    model, layers = charts.load_model(args, [args.out, numbers, images])
    rows = measure(layers)
    print('Means over the layers:')
    means = rows.groupby('branch', sort=False)[['size', 'projection', 'scale_median']]
    print(means.mean().to_string(float_format='{:.3f}'.format))
    plot(rows, args.out)
    plot_kernels(folded_kernels(model), images)
    charts.write_csv(rows.to_dict('records'), numbers)
    print(f'Wrote {args.out}, {images} and {numbers}.')


if __name__ == '__main__':
    main()
