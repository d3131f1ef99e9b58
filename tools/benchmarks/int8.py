"""What does INT8 cost plain and re-parameterised networks?

Quantizes the networks that accuracy.py trained, those with weight decay of their
branches and those with weight decay of their folded kernels, and tests each on the test
images. Differences to float are taken within a network. A stopped run goes on where it
was.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

# Before NumPy and PyTorch are loaded: there is a process for each core.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from accuracy_report import COLOURS, Line, draw_differences
from accuracy_runs import (
    BLOCKS,
    DATA,
    KERNEL_DECAY,
    KEY,
    METRIC,
    NETWORKS,
    REFERENCE,
    STANDARD,
    STRONG,
    STRONG_DECAY,
    STRONG_KERNEL_DECAY,
    folder_of,
)
from accuracy_runs import VALUES as TRAINING_VALUES
from studies import (
    Job,
    Results,
    add_report_arguments,
    last_checkpoint,
    report_and_raise,
    run_jobs,
)
from study_reports import (
    check_document,
    markdown_table,
    mean_and_deviation,
    paired_difference,
    write_tables,
)

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
from mmorepa.deployment.networks import network_from, require
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx, preprocessing
from mmorepa.runs import check_data_folders, read_config
from mmorepa.utils.files import atomic_write, check_outputs

# Of accuracies: in float, and with one scale for each channel or each kernel.
SCHEMES = (
    'float32',
    'per_channel',
    'per_channel_minmax',
    'per_tensor',
    'per_tensor_equalized',
)
# Means over layers; the signal over noise of kernels with one scale each.
VALUES = (*SCHEMES, 'outlier', 'kernel_snr')
# By the variants of the trainings.
DECAYS = {
    STANDARD: 'branches',
    KERNEL_DECAY: 'folded kernels',
    STRONG_DECAY: f'branches, {STRONG:g}',
    STRONG_KERNEL_DECAY: f'folded kernels, {STRONG:g}',
}
TICKS = (-30, -10, -3, -1, -0.5, 0, 0.5, 1)
OF_KERNELS = (KERNEL_DECAY, STRONG_KERNEL_DECAY)
HEADERS = {
    'per_channel': 'one scale a channel',
    'per_channel_minmax': 'one scale a channel, widest ranges',
    'per_tensor': 'one scale a kernel',
    'per_tensor_equalized': 'one scale a kernel, equalized',
}
# What layer_losses keeps the outputs of; only the kernels are of interest here.
_LAYER_IMAGES = 1


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    add_report_arguments(parser, 'int8', 'networks', 'results.md')
    return parser.parse_args(argv)


def trained(study: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """The networks of a study whose weights are there: keys and folders."""
    for row in Results(study / 'results.csv', KEY, TRAINING_VALUES).rows:
        folder = folder_of(row, study / 'runs')
        if (
            row['variant'] in DECAYS
            and row['lr_factor'] == '1'
            and last_checkpoint(folder) is not None
        ):
            yield {name: row[name] for name in KEY}, folder


@torch.no_grad()
def measure(folder: Path, number: int) -> dict[str, str]:
    """Quantizes one network in each way.

    Args:
        folder (Path): Of its training.
        number (int): Images to calibrate with.

    Returns:
        dict[str, str]: The columns :data:`VALUES`.
    """
    torch.set_num_threads(1)
    cfg = read_config(str(folder / 'run.py'))
    model = load_deployed(cfg, read_checkpoint(str(last_checkpoint(folder))))
    images = calibration_images(cfg, model, number)
    shape = image_shape(model, None, images[0].shape[-2:])

    def accuracy(path: Path) -> str:
        with network_from(model, OnnxNetwork(path)):
            return f'{evaluate(cfg, model)[METRIC]:.2f}'

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
        losses = layer_losses(float32, int8, images[:_LAYER_IMAGES])
    for column in ('outlier', 'kernel_snr'):
        mean = statistics.fmean(getattr(loss, column) for loss in losses)
        values[column] = f'{mean:.2f}'
    return values


def _rows_by_network(
    results: Results, data: str
) -> Iterator[tuple[str, str, str, list[dict[str, str]]]]:
    """Network, block, variant, and their rows."""
    for network, blocks in BLOCKS.items():
        for block in blocks:
            for variant in DECAYS:
                wanted = (data, network, block, variant)
                rows = [
                    row
                    for row in results.rows
                    if tuple(row[name] for name in KEY[:4]) == wanted
                ]
                if rows:
                    yield network, block, variant, rows


def _decay(block: str, variant: str) -> str:
    decay = DECAYS[variant]
    return decay.replace('branches', 'kernels') if block == REFERENCE else decay


def _column(rows: Sequence[dict[str, str]], name: str) -> dict[str, float]:
    return {row['seed']: float(row[name]) for row in rows}


def to_markdown(results: Results, data: str) -> Optional[str]:
    """A line for each network, block and weight decay."""
    lines = []
    for network, block, variant, rows in _rows_by_network(results, data):
        float32 = _column(rows, 'float32')
        cells = [
            str(paired_difference(_column(rows, scheme), float32)) for scheme in HEADERS
        ]
        means = [
            f'{statistics.fmean(_column(rows, name).values()):.1f}'
            for name in ('outlier', 'kernel_snr')
        ]
        lines.append(
            (
                f'{NETWORKS[network]}, {BLOCKS[network][block]}',
                _decay(block, variant),
                mean_and_deviation([*float32.values()]),
                *cells,
                *means,
                str(len(rows)),
            )
        )
    headers = ('', 'weight decay of', 'float32 (%)', *HEADERS.values())
    headers = (*headers, 'outlier', 'kernel SNR (dB)', 'seeds')
    return markdown_table(headers, lines) if lines else None


def plot(results: Results, path: Path) -> None:
    """Each seed's difference to float, by scheme."""
    found = [(data, *rest) for data in DATA for rest in _rows_by_network(results, data)]
    several = {(data, network) for data, network, *_ in found}
    figure, all_axes = plt.subplots(
        2,
        2,
        figsize=(10.5, 1.6 + 0.56 * len(found)),
        layout='constrained',
        sharex=True,
    )
    for axes, (scheme, title) in zip(all_axes.flat, HEADERS.items()):
        lines = []
        for data, network, block, variant, rows in found:
            name = f'{BLOCKS[network][block]}: {_decay(block, variant)}'
            if len(several) > 1:
                name = f'{NETWORKS[network]}, {DATA[data]}, {name}'
            columns = (
                {row['seed']: dict(accuracy=row[column]) for row in rows}
                for column in (scheme, 'float32')
            )
            of_branches = variant not in OF_KERNELS
            lines.append(Line(name, COLOURS[block], *columns, of_branches))
        draw_differences(axes, lines)
        # One kind of network loses a hundred times what the others do.
        axes.set_xscale('symlog', linthresh=1)
        axes.set_xticks(TICKS, [f'{tick:g}' for tick in TICKS])
        axes.set(title=title)
        axes.tick_params(labelleft=axes in all_axes[:, 0])
    for axes in all_axes[-1]:
        axes.set_xlabel('points of accuracy beyond float32 (logarithmic beyond 1)')
    figure.suptitle(
        'What INT8 changes: each seed, and the mean with its 95 % interval.\n'
        'Weight decay of branches (dots) or of folded kernels (squares)',
        fontsize='medium',
    )
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


def report(results: Results, args: argparse.Namespace) -> None:
    """Writes tables and figure of all rows."""
    figure = args.out / 'int8.png'
    plot(results, figure)
    tables = {f'int8-{data}': to_markdown(results, data) for data in DATA}
    tables = {name: table for name, table in tables.items() if table}
    caption = 'What INT8 changes, network by network'
    figures = dict(int8=(figure, caption))
    write_tables(tables, figures, args.out / 'results.md', args.document)
    print(f"Wrote tables to '{args.document or args.out}', the figure to '{figure}'.")


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    for package in ('onnx', 'onnxruntime'):
        require(package)
    outputs = [args.out / name for name in ('results.csv', 'results.md', 'int8.png')]
    check_outputs([*outputs, args.document], [args.study / 'results.csv'])
    check_document(args.document)
    results = Results(outputs[0], KEY, VALUES)
    failures = []
    if not args.report_only:
        networks = [*trained(args.study)]
        if not networks:
            raise FileNotFoundError(
                f"no trained networks in '{args.study}': run "
                'tools/benchmarks/accuracy.py --lr-factors 1 first, with '
                '--variants standard kernel_decay'
            )
        # The networks of a study share their data.
        for folder in {key['data']: folder for key, folder in networks}.values():
            check_data_folders(read_config(str(folder / 'run.py')), ('train', 'val'))
        jobs = [
            Job(key, partial(measure, folder, args.images)) for key, folder in networks
        ]
        failures = run_jobs(jobs, results, args.jobs)
    report_and_raise(results, failures, partial(report, results, args))


if __name__ == '__main__':
    main()
