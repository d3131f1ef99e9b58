"""What does INT8 cost plain and re-parameterised networks?

Quantizes the networks that accuracy.py trained, those with weight decay of their
branches and those with weight decay of their folded kernels, and tests each on the test
images. Differences to float are taken within a network. A stopped run goes on where it
was.
"""

import argparse
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Optional

# Before NumPy and PyTorch are loaded: there is a process for each core.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import accuracy_runs as runs
import matplotlib.pyplot as plt
import pandas as pd
import studies
import torch
from accuracy_report import COLOURS
from studies import charts
from trainings import last_checkpoint

from mmorepa.cli import one_line_errors, positive
from mmorepa.converters import read_checkpoint
from mmorepa.deployment import load_deployed
from mmorepa.deployment.inputs import image_shape
from mmorepa.deployment.int8 import (
    calibration_images,
    evaluate,
    layer_losses,
    prepare,
    quantize_onnx,
)
from mmorepa.deployment.networks import network_from
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx, preprocessing
from mmorepa.hub import get_config
from mmorepa.runs import check_data_folders
from mmorepa.utils.requirements import require

# By the variants of the trainings.
DECAYS = {
    runs.STANDARD: 'branches',
    runs.KERNEL_DECAY: 'folded kernels',
    runs.STRONG_DECAY: f'branches, {runs.STRONG:g}',
    runs.STRONG_KERNEL_DECAY: f'folded kernels, {runs.STRONG:g}',
}
TICKS = (-30, -10, -3, -1, -0.5, 0, 0.5, 1)
# Schemes, by the columns of their accuracies.
HEADERS = {
    'per_channel': 'one scale a channel',
    'per_channel_minmax': 'one scale a channel, widest ranges',
    'per_tensor': 'one scale a kernel',
    'per_tensor_equalized': 'one scale a kernel, equalized',
}
# The last two are means over layers, of kernels with one scale each.
VALUES = ('float32', *HEADERS, 'outlier', 'kernel_snr')


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = studies.study_parser(__doc__, 'int8', 'networks')
    parser.add_argument(
        '--study',
        type=Path,
        default=Path('work_dirs/accuracy'),
        help="accuracy.py's folder (default: work_dirs/accuracy)",
    )
    parser.add_argument(
        '--images',
        type=positive,
        default=1000,
        help='training images to calibrate with (default: 1000)',
    )
    return parser.parse_args(argv)


def trained(study: Path) -> list[studies.Key]:
    """The networks of a study whose weights are there."""
    rows = studies.Results(study / 'results.csv', runs.KEY, runs.VALUES).rows
    rows = rows[rows.variant.isin(DECAYS) & (rows.lr_factor == '1')]
    keys = rows[[*runs.KEY]].to_dict('records')
    folders = {runs.folder_of(key, study / 'runs'): key for key in keys}
    return [key for folder, key in folders.items() if last_checkpoint(folder)]


@torch.no_grad()
def measure(key: studies.Key, study: Path, number: int) -> dict[str, str]:
    """Quantizes the network of a row in each way; gives :data:`VALUES`."""
    torch.set_num_threads(1)
    folder = runs.folder_of(key, study / 'runs')
    cfg = get_config(str(folder / 'run.py'))
    model = load_deployed(cfg, read_checkpoint(str(last_checkpoint(folder))))
    images = calibration_images(cfg, model, number)
    shape = image_shape(model, None, images[0].shape[-2:])

    def accuracy(path: Path) -> str:
        with network_from(model, OnnxNetwork(path)):
            return f'{evaluate(cfg, model)[runs.METRIC]:.2f}'

    with tempfile.TemporaryDirectory() as name:
        exported, float32, equalized, int8 = (Path(name, f'{i}.onnx') for i in range(4))
        about = preprocessing(cfg, shape[0])
        export_onnx(model, torch.randn(1, *shape), exported, metadata=about)
        prepare(exported, float32)
        prepare(exported, equalized, equalized=True)
        values = dict(float32=accuracy(float32))
        for scheme, source, options in (
            ('per_channel', float32, {}),
            ('per_channel_minmax', float32, dict(calibration='minmax')),
            ('per_tensor_equalized', equalized, dict(per_channel=False)),
            ('per_tensor', float32, dict(per_channel=False)),
        ):
            quantize_onnx(source, int8, images, **options)
            values[scheme] = accuracy(int8)
        # Only the kernels are of interest here: one image will do.
        losses = layer_losses(float32, int8, images[:1])
    for column in ('outlier', 'kernel_snr'):
        mean = fmean(getattr(loss, column) for loss in losses)
        values[column] = f'{mean:.2f}'
    return values


# Rows by seed, by data, network, block and variant of their trainings.
Groups = dict[tuple[str, str, str, str], pd.DataFrame]


def groups_of(rows: pd.DataFrame) -> Groups:
    """In the order of data, networks, blocks and variants."""
    numbers = rows.set_index('seed').astype(dict.fromkeys(VALUES, float))
    found = dict(iter(numbers.groupby([*runs.KEY[:4]])))
    keys = itertools.product(runs.DATA, runs.NETWORKS, COLOURS, DECAYS)
    return {key: found[key] for key in keys if key in found}


def texts_of(network: str, block: str, variant: str) -> tuple[str, str]:
    """Network and block, and what the weight decay was of."""
    decay = DECAYS[variant]
    if block == runs.REFERENCE:
        decay = decay.replace('branches', 'kernels')
    return f'{runs.NETWORKS[network]}, {runs.BLOCKS[network][block]}', decay


def table(groups: Groups) -> str:
    """A line for each network, block and weight decay."""
    rows = []
    for (_, *kind), found in groups.items():
        text, decay = texts_of(*kind)
        row = {'': text, 'weight decay of': decay}
        row['float32 (%)'] = studies.mean_and_deviation(found.float32)
        for scheme, header in HEADERS.items():
            row[header] = studies.difference(found[scheme], found.float32)
        row['outlier'] = f'{fmean(found.outlier):.1f}'
        row['kernel SNR (dB)'] = f'{fmean(found.kernel_snr):.1f}'
        rows.append({**row, 'seeds': str(len(found))})
    return studies.markdown_table(rows)


def plot(groups: Groups) -> plt.Figure:
    """Each seed's difference to float, by scheme."""
    figure, grid = charts.panels(2, 2, 10.5, 1.6 + 0.56 * len(groups), sharex=True)
    for axes, (scheme, title) in zip(grid.flat, HEADERS.items()):
        lines = []
        for (data, network, block, variant), found in groups.items():
            text = ': '.join(texts_of(network, block, variant))
            each = studies.paired_differences(found[scheme], found.float32)
            line = (f'{data}, {text}', COLOURS[block], each, 'kernel' not in variant)
            lines.append(studies.Line(*line))
        studies.draw_differences(axes, lines)
        # One kind of network loses a hundred times what the others do.
        axes.set_xscale('symlog', linthresh=1)
        axes.set_xticks(TICKS, [f'{tick:g}' for tick in TICKS])
        axes.set(title=title)
        axes.tick_params(labelleft=axes in grid[:, 0])
    for axes in grid[-1]:
        axes.set_xlabel('points of accuracy beyond float32 (logarithmic beyond 1)')
    figure.suptitle(
        'What INT8 changes: each seed, and the mean with its 95 % interval.\n'
        'Weight decay of branches (dots) or of folded kernels (squares)',
        fontsize='medium',
    )
    return figure


def report(rows: pd.DataFrame) -> studies.Report:
    """A table for each data set, and a figure."""
    groups = groups_of(rows)
    tables = {}
    for data in dict.fromkeys(data for data, *_ in groups):
        own = {key: found for key, found in groups.items() if key[0] == data}
        tables[f'int8-{data}'] = table(own)
    return tables, dict(int8=plot(groups))


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    for package in ('onnx', 'onnxruntime'):
        require(package)

    def make_keys() -> list[studies.Key]:
        keys = trained(args.study)
        if not keys:
            raise FileNotFoundError(
                f"no trained networks in '{args.study}': run "
                'tools/benchmarks/accuracy.py --lr-factors 1 first, with '
                '--variants standard kernel_decay'
            )
        # The networks of a study share their data.
        for key in {key['data']: key for key in keys}.values():
            folder = runs.folder_of(key, args.study / 'runs')
            check_data_folders(get_config(str(folder / 'run.py')), ('train', 'val'))
        return keys

    results = studies.Results(args.out / 'results.csv', runs.KEY, VALUES)
    run = partial(measure, study=args.study, number=args.images)
    inputs = [args.study / 'results.csv']
    studies.run_study(args, results, make_keys, run, report, inputs)


if __name__ == '__main__':
    main()
