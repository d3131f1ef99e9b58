"""Draws how alike the branches of every layer are, as cosines of their kernels.

Branches whose kernels point the same way are one branch, as far as the network is
concerned: a cosine of 1 says that one of them could be left out.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import model_parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    return model_parser(__doc__, 'branch_similarity.png').parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import matplotlib.pyplot as plt
import pandas as pd
from charts import (
    BLACK,
    SKY,
    branch_names,
    label_layers,
    load_model,
    save,
    short,
    write_csv,
)
from matplotlib.axes import Axes

from mmorepa.analysis import BranchKernels, cosine_similarities
from mmorepa.cli import one_line_errors

COLUMNS = 8


def pairs(layers: Sequence[BranchKernels]) -> pd.DataFrame:
    """A row for each pair of branches of each layer."""
    rows = []
    for layer in layers:
        found = cosine_similarities(layer.kernels).tolist()
        for (i, one), (j, other) in itertools.combinations(enumerate(layer.kernels), 2):
            rows.append(dict(layer=layer.name, a=one, b=other, cosine=found[i][j]))
    return pd.DataFrame(rows)


def plot(layers: Sequence[BranchKernels], rows: pd.DataFrame, path: Path) -> None:
    """The range of each layer over depth, and below it a heat map of each layer."""
    # Cosines are small as a rule: colours and axis span those that occur.
    limit = rows.cosine.abs().clip(0.05, 1).max()
    lines = -(-len(layers) // COLUMNS)
    figure = plt.figure(figsize=(12, 4.2 + 1.75 * lines), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=(4.2, 1.75 * lines))
    _plot_over_depth(above.subplots(), rows, limit)

    # One letter or two for each branch, explained in a line.
    names = branch_names({*rows.a, *rows.b})
    marks = {name: ''.join(w[0] for w in name.split('_')) for name in names}
    grid = below.subplots(lines, COLUMNS, squeeze=False)
    colours = plt.get_cmap('PuOr_r').with_extremes(bad='#DDDDDD')
    for axes, layer in zip(grid.flat, layers):
        own = [marks[name] for name in layer.kernels]
        cosines = cosine_similarities(layer.kernels).fill_diagonal_(float('nan'))
        style = dict(cmap=colours, vmin=-limit, vmax=limit)
        image = axes.imshow(cosines.numpy(), **style)
        axes.set_title(short(layer.name), fontsize=8)
        axes.set_xticks(range(len(own)), own, fontsize=7)
        axes.set_yticks(range(len(own)), own, fontsize=7)
        axes.tick_params(length=0, pad=1)
    for axes in grid.flat[len(layers) :]:
        axes.axis('off')
    shrink = min(1, 1.6 / lines)
    below.colorbar(image, ax=grid, label='cosine of two kernels', shrink=shrink)
    key = ', '.join(f'{mark} = {name}' for name, mark in marks.items())
    title = f'Each layer. {key}. Grey: itself, or a kernel of zeros'
    below.suptitle(title, fontsize=10)
    save(figure, path)


def _plot_over_depth(axes: Axes, rows: pd.DataFrame, limit: float) -> None:
    by_layer = rows.groupby('layer', sort=False).cosine
    mean = rows.cosine.abs().groupby(rows.layer, sort=False).mean()
    x, low, high = range(len(mean)), by_layer.min(), by_layer.max()
    axes.vlines(x, low, high, color=SKY, linewidth=6, label='all pairs')
    axes.plot(x, mean, 'o-', color=BLACK, markersize=4, label='mean of |cosine|')
    axes.axhline(0, color='grey', linewidth=0.8)
    axes.set_title(
        'How alike the branches of a layer are (1: the same kernel up to a factor, '
        '0: independent)'
    )
    axes.set(ylabel='cosine of two kernels', ylim=(-1.1 * limit, 1.4 * limit))
    label_layers(axes, mean.index)
    axes.grid(alpha=0.3, axis='y')
    axes.legend(loc='upper left', ncols=2)


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    numbers = args.out.with_suffix('.csv')
    _, layers = load_model(args, [args.out, numbers])
    rows = pairs(layers)
    print('The pairs of branches that are most alike:')
    alike = rows.sort_values('cosine', key=lambda cosine: -cosine.abs()).head()
    print(alike.to_string(index=False, float_format='{:+.3f}'.format))
    plot(layers, rows, args.out)
    write_csv(rows.to_dict('records'), numbers)
    print(f'Wrote {args.out} and {numbers}.')


if __name__ == '__main__':
    main()
