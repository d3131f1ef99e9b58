"""What the figures share: colours, files, and the models that they are about."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from mmorepa.analysis import BranchKernels, branch_kernels
from mmorepa.converters import load_training_form, read_checkpoint
from mmorepa.runs import build_model, read_config
from mmorepa.utils.files import atomic_write, check_outputs

# Okabe and Ito's colours, which differ for every kind of colour vision.
COLOURS = dict(
    origin='#0072B2',
    average='#E69F00',
    frequency='#009E73',
    pointwise_kxk='#CC79A7',
    pointwise='#56B4E9',
    depthwise_separable='#D55E00',
    pointwise_pointwise='#F0E442',
    identity='#999999',
)
# For what is no branch, in order.
SERIES = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')


def load_model(
    args: argparse.Namespace, outputs: Sequence[Optional[Path]]
) -> tuple[nn.Module, list[BranchKernels]]:
    """The trained model, and the branches of its layers.

    Args:
        args (argparse.Namespace): Of :func:`start.add_model_arguments`.
        outputs (Sequence[Path | None]): What will be written.

    Raises:
        ValueError: If no layer has several branches.
    """
    check_outputs(outputs, [args.config, args.checkpoint])
    model = build_model(read_config(args.config, args.cfg_options))
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
    return COLOURS.get(branch, '#000000')


def branch_names(layers: Sequence[BranchKernels]) -> list[str]:
    """Those that occur, in the order of :data:`COLOURS`."""
    found = {name for layer in layers for name in layer.kernels}
    return [*(n for n in COLOURS if n in found), *sorted(found - COLOURS.keys())]


def label_layers(axes: Axes, names: Sequence[str]) -> None:
    """Names along the x axis, as many as can be read."""
    every = -(-len(names) // 40)
    places = range(0, len(names), every)
    axes.set_xticks(places, [short(names[i]) for i in places], rotation=90)
    axes.set_xlim(-0.6, len(names) - 0.4)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, and closes the figure."""
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


def write_csv(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Writes rows of the same columns; numbers with six digits."""
    with atomic_write(path) as file, file.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator='\n')
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()}
            )
