"""What the figures share: colours, files, and the models that they are about."""

import argparse
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from mmorepa.analysis import BranchKernels, branch_kernels
from mmorepa.converters import load_training_form, read_checkpoint
from mmorepa.hub import get_config
from mmorepa.runs import build_model
from mmorepa.utils.files import atomic_write, check_outputs

# Okabe and Ito's colours, which differ for every kind of colour vision.
BLACK, BLUE, ORANGE, GREEN = '#000000', '#0072B2', '#E69F00', '#009E73'
SKY, VERMILION, PURPLE, YELLOW = '#56B4E9', '#D55E00', '#CC79A7', '#F0E442'
GREY = '#999999'
# Of the branches.
COLOURS = dict(
    origin=BLUE,
    average=ORANGE,
    frequency=GREEN,
    pointwise_kxk=PURPLE,
    pointwise=SKY,
    depthwise_separable=VERMILION,
    pointwise_pointwise=YELLOW,
    identity=GREY,
)
# For what is no branch, in order.
SERIES = (BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)


def load_model(
    args: argparse.Namespace, outputs: Sequence[Path]
) -> tuple[nn.Module, list[BranchKernels]]:
    """The trained model of these arguments, and the branches of its layers."""
    check_outputs(outputs, [args.config, args.checkpoint])
    model = build_model(get_config(args.config, args.cfg_options))
    load_training_form(model, read_checkpoint(args.checkpoint)['state_dict'])
    print('Computing the kernels of the branches …', flush=True)
    layers = branch_kernels(model)
    if not layers:
        raise ValueError(
            f'{args.config!r} has no layer of several branches: is its block plain?'
        )
    return model, layers


def short(name: str) -> str:
    """A layer's name without what all of them start with."""
    return name.removeprefix('backbone.')


def colour_of(branch: str) -> str:
    """That of a branch; all unknown ones share black."""
    return COLOURS.get(branch, BLACK)


def branch_names(names: Iterable[str]) -> list[str]:
    """Each of them once, in the order of :data:`COLOURS`."""
    found = {*names}
    return [*(n for n in COLOURS if n in found), *sorted(found - COLOURS.keys())]


def label_layers(axes: Axes, names: Sequence[str]) -> None:
    """Names along the x axis, as many as can be read."""
    every = -(-len(names) // 40)
    places = range(0, len(names), every)
    axes.set_xticks(places, [short(names[i]) for i in places], rotation=90)
    axes.set_xlim(-0.6, len(names) - 0.4)


def panels(
    lines: int, columns: int, width: float, height: float, **options
) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches, and its axes in an array of two dimensions."""
    return plt.subplots(
        lines,
        columns,
        figsize=(width, height),
        layout='constrained',
        squeeze=False,
        **options,
    )


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, and closes the figure."""
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


def write_csv(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Writes rows of the same columns; numbers with six digits."""
    with atomic_write(path) as file, file.open('w', newline='') as stream:
        writer = csv.writer(stream, lineterminator='\n')
        writer.writerow(rows[0])
        for row in rows:
            values = row.values()
            writer.writerow([f'{v:.6g}' if isinstance(v, float) else v for v in values])
