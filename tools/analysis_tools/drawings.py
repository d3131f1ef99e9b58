"""Draws the figures of docs/mathematics.md and of the README."""

import argparse
from pathlib import Path
from typing import Optional

import matplotlib.pyplot as plt
import numpy as np
from charts import COLOURS
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[2]
GREY, INK, LINE = '#E8E8E8', '#222222', '#999999'
PAPER, BLUE, ORANGE = '#FAFAFA', '#D6E6F2', '#FBE3C0'
STYLE = {'font.size': 13, 'svg.hashsalt': 'mmorepa', 'text.color': INK}


def canvas(width: float, height: float) -> Axes:
    """Axes whose unit is a tenth of an inch, without frame."""
    figure = plt.figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect='equal')
    axes.axis('off')
    return axes


def write(axes: Axes, x: float, y: float, text: str, size: float = 12, **style) -> None:
    """A text around its centre, or where ``style`` says."""
    style = {'ha': 'center', 'va': 'center', **style}
    axes.text(x, y, text, fontsize=size, **style)


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, **style) -> None:
    """A rounded box around its centre."""
    style = {'facecolor': GREY, 'edgecolor': INK, 'linewidth': 1, **style}
    shape = f'round,pad=0,rounding_size={min(w, h, 8) / 5}'
    axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, shape, **style))
    write(axes, x, y, text)


def arrow(axes: Axes, start: tuple, end: tuple, colour: str = INK) -> None:
    style = dict(arrowstyle='-|>', color=colour, linewidth=1.2, shrinkA=0, shrinkB=0)
    axes.annotate('', end, start, arrowprops=style)


def grid(
    axes: Axes, x: float, y: float, size: float, values: np.ndarray, colour: str
) -> None:
    """A kernel around its centre; the darker a tap, the larger its weight."""
    strength = np.abs(values) / np.abs(values).max()
    strength = np.where(strength > 0, 0.1 + 0.9 * strength, 0)
    edges = size * np.linspace(-0.5, 0.5, len(values) + 1)
    colours = LinearSegmentedColormap.from_list('', ['white', colour])
    style = dict(cmap=colours, vmin=0, vmax=1, edgecolors=INK, linewidth=0.7)
    axes.pcolormesh(x + edges, y - edges, strength, **style)


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


def folded_kernel() -> np.ndarray:
    return np.random.default_rng(5).uniform(0.2, 1, (3, 3))


def branches_to_kernel() -> Axes:
    """Six kernels are added up; one conv runs, in training and after it."""
    axes = canvas(96, 47)
    for x, width, title in ((33, 64, 'Training'), (81, 28, 'Deployed')):
        box(axes, x, 23.5, width, 44, '', facecolor=PAPER, edgecolor=LINE)
        write(axes, x, 43.5, title, 15, weight='bold')
    for i, (name, values) in enumerate(example_kernels().items()):
        x = 7.5 + i * 10.2
        grid(axes, x, 36.5, 6, values, COLOURS[name])
        arrow(axes, (x, 33), (33 + (x - 33) * 0.12, 27.2), COLOURS[name])
    write(axes, 3.5, 28.3, 'six branches,\nall of them\nkernels', ha='left')
    write(axes, 62.5, 28.3, 'added up\nbefore the\nconv runs', ha='right')
    for x in (33, 81):
        grid(axes, x, 22.5, 8, folded_kernel(), INK)
        arrow(axes, (x, 18), (x, 12.2))
        box(axes, x, 9.5, 13, 5, 'one conv', facecolor=BLUE)
        arrow(axes, (x - 10.5, 9.5), (x - 6.7, 9.5))
        write(axes, x - 10.9, 9.5, 'in', 13, ha='right')
        arrow(axes, (x + 6.5, 9.5), (x + 9.4, 9.5))
    box(axes, 48, 9.5, 10, 5, 'norm')
    arrow(axes, (53, 9.5), (57, 9.5))
    write(axes, 57.5, 9.5, 'out', 13, ha='left')
    write(axes, 90.6, 9.5, 'out', 13, ha='left')
    write(axes, 33, 4.7, 'the images pass through one conv')
    write(axes, 81, 4.7, 'the norm is in the kernel')
    write(axes, 81, 31, 'one plain\nnn.Conv2d', 13)
    return axes


def two_ways_to_train() -> Axes:
    """Branches on feature maps, and branches in the kernel."""
    axes = canvas(96, 44)
    write(axes, 23, 41.5, 'Branches on feature maps (DBB)', 13, weight='bold')
    write(axes, 73, 41.5, 'Branches in the kernel (OREPA)', 13, weight='bold')
    axes.plot((48, 48), (2, 42), color=LINE, lw=1)
    write(axes, 3.5, 20, 'in', 13)
    for y, name in zip((34, 25, 15, 6), ('3×3', '1×1', '1×1, average', '1×1, 3×3')):
        arrow(axes, (5, 20), (9.3, y))
        box(axes, 18, y, 17, 5.6, name, facecolor=BLUE)
        arrow(axes, (26.5, y), (28.8, y))
        box(axes, 32.5, y, 7, 5.6, 'norm')
        arrow(axes, (36, y), (39.9, 20.5 + (y - 20) * 0.1))
    write(axes, 41.6, 20, '+', 22)
    arrow(axes, (43, 20), (45.3, 20))
    write(axes, 45.2, 22.5, 'out', 11)
    for i, (name, values) in enumerate(example_kernels().items()):
        x = 55 + i * 7.2
        grid(axes, x, 34.5, 5, values, COLOURS[name])
        arrow(axes, (x, 31.7), (73 + (x - 73) * 0.1, 26.4), COLOURS[name])
    box(axes, 73, 23.5, 18, 5, 'sum of kernels', facecolor=ORANGE)
    arrow(axes, (73, 21), (73, 14.4))
    write(axes, 51, 11.5, 'in', 13)
    arrow(axes, (53, 11.5), (65.8, 11.5))
    box(axes, 73, 11.5, 14, 5.6, '3×3', facecolor=BLUE)
    arrow(axes, (80, 11.5), (82.5, 11.5))
    box(axes, 86, 11.5, 7, 5.6, 'norm')
    arrow(axes, (89.5, 11.5), (92, 11.5))
    write(axes, 93.8, 11.5, 'out', 11)
    write(axes, 73, 4.5, 'the sum costs the same for 1 image and for 64')
    return axes


# What each branch is, and the kernels that it is composed of.
BRANCHES = dict(
    origin=('the plain kernel', []),
    average=('1×1, spread evenly over the taps', ['1×1', '× 1/9']),
    frequency=('1×1, times a fixed cosine', ['1×1', '× cos']),
    pointwise_kxk=('1×1 (starts as identity), then 3×3', ['1×1', '3×3']),
    pointwise=('1×1, in the centre tap', ['1×1']),
    depthwise_separable=('depthwise 3×3 (8 per channel), then 1×1', ['8 × 3×3', '1×1']),
)


def six_branches() -> Axes:
    """What each branch is made of, and the kernel that it makes."""
    axes = canvas(96, 68)
    for i, (name, values) in enumerate(example_kernels().items()):
        text, parts = BRANCHES[name]
        colour, y = COLOURS[name], 62 - i * 11
        write(axes, 1, y + 1.8, name, 13, weight='bold', ha='left')
        write(axes, 1, y - 1.8, text, 11.5, ha='left')
        style = dict(facecolor='white', edgecolor=colour)
        for place, part in enumerate(parts):
            box(axes, 44 + 12 * place, y, 9, 5, part, **style)
        if '×3' in ''.join(parts):
            write(axes, 50, y, '∘', 13)
        if parts:
            arrow(axes, (36.8 + 12 * len(parts), y), (67.2, y), colour)
        grid(axes, 71.5, y, 7, values, colour)
        write(axes, 76.5, y, rf'× $s_{i}$', 14, ha='left')
        arrow(axes, (81, y), (86.6, 34.5 + (y - 34.5) * 0.13), colour)
    grid(axes, 91, 34.5, 8, folded_kernel(), INK)
    write(axes, 91, 28, 'W', 15, weight='bold')
    return axes


def deep_linear_stem() -> Axes:
    """Three 3×3 kernels that make one of 7×7."""
    axes = canvas(96, 24)
    draw = np.random.default_rng(7).uniform
    for x in (6, 21, 36):
        grid(axes, x, 14, 9, draw(0.2, 1, (3, 3)), COLOURS['origin'])
        write(axes, x, 5.5, 'OREPA 3×3')
    for x, sign in ((13.5, '⋆'), (28.5, '⋆'), (43.5, '=')):
        write(axes, x, 14, sign, 20)
    rows, columns = np.mgrid[-3:4, -3:4]
    bell = np.exp(-(rows**2 + columns**2) / 5)
    grid(axes, 57, 13.5, 19, bell * draw(0.4, 1, (7, 7)), INK)
    write(axes, 57, 1.7, 'one 7×7 kernel')
    text = 'each factor widens the\nkernel by one tap on\nevery side: 3, 5, 7'
    write(axes, 69.5, 14, text, ha='left')
    return axes


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/images')
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in (
            branches_to_kernel,
            two_ways_to_train,
            six_branches,
            deep_linear_stem,
        ):
            # No date: the same drawing is the same file.
            path, metadata = args.out / f'{draw.__name__}.svg', {'Date': None}
            draw().figure.savefig(path, facecolor='white', metadata=metadata)


if __name__ == '__main__':
    main()
