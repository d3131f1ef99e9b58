"""Draws the figures of docs/mathematics.md and of the README."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from charts import COLOURS
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[2]
GREY, INK = '#E8E8E8', '#222222'
STYLE = {'font.size': 13, 'svg.hashsalt': 'mmorepa', 'text.color': INK}


def canvas(width: float, height: float) -> Axes:
    """Axes whose unit is a tenth of an inch, without frame."""
    figure = plt.figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect='equal')
    axes.axis('off')
    return axes


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, **style) -> None:
    """A rounded box around its centre."""
    style = {'facecolor': GREY, 'edgecolor': INK, 'linewidth': 1, **style}
    shape = f'round,pad=0,rounding_size={min(w, h, 8) / 5}'
    axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, shape, **style))
    axes.text(x, y, text, ha='center', va='center', fontsize=12)


def arrow(axes: Axes, start: tuple, end: tuple, **style) -> None:
    style = {'arrowstyle': '-|>', 'color': INK, 'linewidth': 1.2, **style}
    axes.annotate('', end, start, arrowprops=dict(shrinkA=0, shrinkB=0, **style))


def grid(
    axes: Axes, x: float, y: float, size: float, values: np.ndarray, colour: str
) -> None:
    """A kernel around its centre; the darker a tap, the larger its weight."""
    k = len(values)
    strongest = np.abs(values).max()
    for row in range(k):
        for column in range(k):
            corner = (
                x - size / 2 + column * size / k,
                y + size / 2 - (row + 1) * size / k,
            )
            alpha = 0.1 + 0.9 * abs(values[row, column]) / strongest
            if values[row, column] == 0:
                alpha = 0
            axes.add_patch(
                plt.Rectangle(
                    corner, size / k, size / k, color=colour, alpha=alpha, lw=0
                )
            )
            axes.add_patch(
                plt.Rectangle(corner, size / k, size / k, fill=False, ec=INK, lw=0.7)
            )


def example_kernels() -> dict[str, np.ndarray]:
    """One 3×3 kernel of each branch, for one pair of channels."""
    draw = np.random.default_rng(3).uniform
    centre = np.zeros((3, 3))
    centre[1, 1] = 1
    cosine = np.cos(np.pi * (np.arange(3) + 0.5) / 3)
    return dict(
        origin=draw(0.2, 1, (3, 3)),
        average=np.ones((3, 3)),
        frequency=np.repeat(cosine[:, None], 3, 1),
        pointwise_kxk=draw(0.2, 1, (3, 3)),
        pointwise=centre,
        depthwise_separable=draw(0.2, 1, (3, 3)),
    )


def branches_to_kernel() -> Axes:
    """Six kernels are added up; one conv runs, in training and after it."""
    axes = canvas(96, 47)
    box(axes, 33, 23.5, 64, 44, '', facecolor='#FAFAFA', edgecolor='#999999')
    box(axes, 81, 23.5, 28, 44, '', facecolor='#FAFAFA', edgecolor='#999999')
    axes.text(33, 42.6, 'Training', ha='center', fontsize=15, weight='bold')
    axes.text(81, 42.6, 'Deployed', ha='center', fontsize=15, weight='bold')
    for i, (name, values) in enumerate(example_kernels().items()):
        x = 7.5 + i * 10.2
        grid(axes, x, 36.5, 6, values, COLOURS[name])
        arrow(axes, (x, 33), (33 + (x - 33) * 0.12, 27.2), color=COLOURS[name])
    axes.text(
        3.5, 28.3, 'six branches,\nall of them\nkernels', fontsize=12, va='center'
    )
    axes.text(
        62.5,
        28.3,
        'added up\nbefore the\nconv runs',
        fontsize=12,
        va='center',
        ha='right',
    )
    folded = np.random.default_rng(5).uniform(0.2, 1, (3, 3))
    for x, with_norm in ((33, True), (81, False)):
        grid(axes, x, 22.5, 8, folded, INK)
        arrow(axes, (x, 18), (x, 12.2))
        box(axes, x, 9.5, 13, 5, 'one conv', facecolor='#D6E6F2')
        arrow(axes, (x - 10.5, 9.5), (x - 6.7, 9.5))
        axes.text(x - 10.9, 9.5, 'in', ha='right', va='center')
        if with_norm:
            arrow(axes, (x + 6.5, 9.5), (x + 9.8, 9.5))
            box(axes, x + 15, 9.5, 10, 5, 'norm')
            arrow(axes, (x + 20, 9.5), (x + 24, 9.5))
            axes.text(x + 24.5, 9.5, 'out', va='center')
        else:
            arrow(axes, (x + 6.5, 9.5), (x + 9.3, 9.5))
            axes.text(x + 9.6, 9.5, 'out', va='center')
    axes.text(33, 4.2, 'the images pass through one conv', ha='center', fontsize=12)
    axes.text(81, 4.2, 'the norm is in the kernel', ha='center', fontsize=12)
    axes.text(81, 31, 'one plain\nnn.Conv2d', ha='center', va='center', fontsize=13)
    return axes


def two_ways_to_train() -> Axes:
    """Branches on feature maps, and branches in the kernel."""
    axes = canvas(96, 44)
    blue, orange = '#D6E6F2', '#FBE3C0'
    axes.text(23, 41, 'Branches on feature maps (DBB)', ha='center', weight='bold')
    axes.text(73, 41, 'Branches in the kernel (OREPA)', ha='center', weight='bold')
    axes.plot((48, 48), (2, 42), color='#999999', lw=1)
    axes.text(3.5, 20, 'in', ha='center', va='center')
    for y, name in zip((34, 25, 15, 6), ('3×3', '1×1', '1×1, average', '1×1, 3×3')):
        arrow(axes, (5, 20), (9.3, y))
        box(axes, 18, y, 17, 5.6, name, facecolor=blue)
        arrow(axes, (26.5, y), (28.8, y))
        box(axes, 32.5, y, 7, 5.6, 'norm')
        arrow(axes, (36, y), (39.9, 20.5 + (y - 20) * 0.1))
    axes.text(41.6, 20, '+', ha='center', va='center', fontsize=22)
    arrow(axes, (43, 20), (45.3, 20))
    axes.text(45.2, 21.5, 'out', ha='center', va='bottom', fontsize=11)
    for i, (name, values) in enumerate(example_kernels().items()):
        x = 55 + i * 7.2
        grid(axes, x, 34.5, 5, values, COLOURS[name])
        arrow(axes, (x, 31.7), (73 + (x - 73) * 0.1, 26.4), color=COLOURS[name])
    box(axes, 73, 23.5, 18, 5, 'sum of kernels', facecolor=orange)
    arrow(axes, (73, 21), (73, 14.4))
    axes.text(51, 11.5, 'in', ha='center', va='center')
    arrow(axes, (53, 11.5), (65.8, 11.5))
    box(axes, 73, 11.5, 14, 5.6, '3×3', facecolor=blue)
    arrow(axes, (80, 11.5), (82.5, 11.5))
    box(axes, 86, 11.5, 7, 5.6, 'norm')
    arrow(axes, (89.5, 11.5), (92, 11.5))
    axes.text(93.8, 11.5, 'out', ha='center', va='center', fontsize=11)
    axes.text(
        73, 4, 'the sum costs the same for 1 image and for 64', ha='center', fontsize=12
    )
    return axes


def six_branches() -> Axes:
    """What each branch is made of, and the kernel that it makes."""
    rows = dict(
        origin=('the plain kernel', []),
        average=('1×1, spread evenly over the taps', ['1×1', '× 1/9']),
        frequency=('1×1, times a fixed cosine', ['1×1', '× cos']),
        pointwise_kxk=('1×1 (starts as identity), then 3×3', ['1×1', '3×3']),
        pointwise=('1×1, in the centre tap', ['1×1']),
        depthwise_separable=(
            'depthwise 3×3 (8 per channel), then 1×1',
            ['8 × 3×3', '1×1'],
        ),
    )
    axes = canvas(96, 68)
    for i, (name, values) in enumerate(example_kernels().items()):
        text, parts = rows[name]
        y = 62 - i * 11
        axes.text(1, y + 1.8, name, weight='bold', va='center', color=INK)
        axes.text(1, y - 1.8, text, va='center', fontsize=11.5)
        x = 44
        for part in parts:
            box(axes, x, y, 9, 5, part, facecolor='white', edgecolor=COLOURS[name])
            if part != parts[-1]:
                axes.text(
                    x + 6,
                    y,
                    '∘' if '×3' in ''.join(parts) else '',
                    va='center',
                    ha='center',
                )
            x += 12
        if parts:
            arrow(axes, (x - 7.2, y), (67.2, y), color=COLOURS[name])
        grid(axes, 71.5, y, 7, values, COLOURS[name])
        axes.text(76.5, y, rf'× $s_{i}$', va='center', fontsize=14)
        arrow(axes, (81, y), (86.6, 34.5 + (y - 34.5) * 0.13), color=COLOURS[name])
    folded = np.random.default_rng(5).uniform(0.2, 1, (3, 3))
    grid(axes, 91, 34.5, 8, folded, INK)
    axes.text(91, 28, 'W', ha='center', va='center', fontsize=15, weight='bold')
    return axes


def deep_linear_stem() -> Axes:
    """Three 3×3 kernels that make one of 7×7."""
    axes = canvas(96, 24)
    draw = np.random.default_rng(7).uniform
    for i in range(3):
        x = 6 + i * 15
        grid(axes, x, 14, 9, draw(0.2, 1, (3, 3)), COLOURS['origin'])
        axes.text(x, 5.5, 'OREPA 3×3', ha='center', va='center', fontsize=12)
        if i:
            axes.text(x - 7.5, 14, '⋆', ha='center', va='center', fontsize=20)
    axes.text(43.5, 14, '=', ha='center', va='center', fontsize=20)
    rows, columns = np.mgrid[-3:4, -3:4]
    grid(
        axes,
        57,
        13.5,
        19,
        np.exp(-(rows**2 + columns**2) / 5) * draw(0.4, 1, (7, 7)),
        INK,
    )
    axes.text(57, 1.7, 'one 7×7 kernel', ha='center', va='center', fontsize=12)
    axes.text(
        69.5,
        14,
        'each factor widens the\nkernel by one tap on\nevery side: 3, 5, 7',
        va='center',
        fontsize=12,
    )
    return axes


DRAWINGS: tuple[Callable[[], Axes], ...] = (
    branches_to_kernel,
    two_ways_to_train,
    six_branches,
    deep_linear_stem,
)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Draws the figures of docs/mathematics.md and of the README.'
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'docs/images',
        help='the folder for the .svg files (default: docs/images)',
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in DRAWINGS:
            figure = draw().figure
            # No date: the same drawing is the same file.
            figure.savefig(
                args.out / f'{draw.__name__}.svg',
                facecolor='white',
                metadata={'Date': None},
            )
            plt.close(figure)


if __name__ == '__main__':
    main()
