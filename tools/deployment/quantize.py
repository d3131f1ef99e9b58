"""Quantizes a trained network to INT8, and tells what that costs, layer by layer.

After training, by ONNX Runtime: weights and activations become 8 bits wide, with ranges
from training images. The float network and the INT8 network are tested by the config's
own evaluator on its validation data. The file runs wherever ONNX Runtime does.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch

from mmorepa.analysis.complexity import median_seconds
from mmorepa.cli import add_config_options, one_line_errors, positive
from mmorepa.converters import read_checkpoint
from mmorepa.deployment import load_deployed
from mmorepa.deployment.inputs import DEFAULT_SIZE, image_shape, test_batch
from mmorepa.deployment.int8 import (
    ACTIVATIONS,
    CALIBRATIONS,
    LayerLoss,
    calibration_images,
    evaluate,
    layer_losses,
    prepare,
    quantize_onnx,
)
from mmorepa.deployment.onnx_files import (
    OnnxNetwork,
    export_onnx,
    network_from,
    padded,
    preprocessing,
    require,
)
from mmorepa.engine.config import check_data_folders, read_config
from mmorepa.utils.files import atomic_write, check_outputs
from mmorepa.utils.tables import format_table

# Their outputs are kept in memory for the comparison of the layers.
LAYER_IMAGES = 8


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='the config, of either form')
    parser.add_argument('checkpoint', help='the checkpoint, of either form')
    parser.add_argument('out', help='the ONNX file to write')
    parser.add_argument(
        '--per-tensor',
        action='store_true',
        help='one scale for a whole kernel, not one for each of its output channels',
    )
    parser.add_argument(
        '--equalize',
        action='store_true',
        help='give the kernels of every conv-ReLU-conv the same ranges first '
        '(cross-layer equalization, which changes nothing in float)',
    )
    parser.add_argument(
        '--images',
        type=positive,
        default=200,
        help='training images to calibrate with (default: 200)',
    )
    parser.add_argument(
        '--calibration',
        choices=CALIBRATIONS,
        default='minmax',
        help='how the ranges of activations are chosen (default: minmax)',
    )
    parser.add_argument(
        '--activations',
        choices=ACTIVATIONS,
        default='uint8',
        help='uint8 suits x86, int8 suits ARM and GPUs (default: uint8)',
    )
    parser.add_argument(
        '--reduce-range',
        action='store_true',
        help='weights of 7 bits, for x86 without VNNI, where sums saturate',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=positive,
        metavar=('HEIGHT', 'WIDTH'),
        help='the size of the images that the file takes; by default that of the test '
        f'images, or {DEFAULT_SIZE} {DEFAULT_SIZE} without test data; smaller images '
        'of detectors are padded',
    )
    parser.add_argument(
        '--worst',
        type=positive,
        default=10,
        help='how many of the layers that lose most are printed (default: 10)',
    )
    parser.add_argument('--json', help='a file for all figures, of every layer')
    add_config_options(parser)
    return parser.parse_args(argv)


def saturates() -> bool:
    """Whether this CPU adds up products of 8 bits without VNNI."""
    if platform.machine() not in ('x86_64', 'AMD64'):
        return False
    try:
        return 'vnni' not in Path('/proc/cpuinfo').read_text()
    except OSError:
        return False


def print_losses(losses: list[LayerLoss], most: int) -> None:
    """The layers whose outputs lose most, the worst first."""
    # Where an output is not quantized, NaN, it cannot be ranked.
    ranked = sorted(
        losses, key=lambda loss: (loss.output_snr != loss.output_snr, loss.output_snr)
    )
    headers = ('layer', 'range', 'outlier', 'kernel SNR (dB)', 'output SNR (dB)')
    rows = [
        (
            loss.name,
            f'{loss.weight_range:.3g}',
            f'{loss.outlier:.1f}',
            f'{loss.kernel_snr:.1f}',
            f'{loss.output_snr:.1f}',
        )
        for loss in ranked[:most]
    ]
    print(f'\nThe {len(rows)} layers of {len(losses)} that lose most:')
    print(format_table(headers, rows))
    print(
        'range: the largest weight. outlier: that of the widest channel over that of '
        'the\nmedian channel. SNR: signal over noise, a mean over channels; that of an '
        'output has\nthe errors of all layers before it.'
    )


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    check_outputs([args.out, args.json], [args.config, args.checkpoint])
    for package in ('onnx', 'onnxruntime'):
        require(package)
    cfg = read_config(args.config, args.cfg_options)
    model = load_deployed(cfg, read_checkpoint(args.checkpoint))
    check_data_folders(cfg, ('train', 'val'))
    shape = image_shape(model, test_batch(cfg), args.shape)
    size = shape[1:]
    if saturates() and not args.reduce_range:
        print('This CPU has no VNNI: if the accuracy falls, try --reduce-range.')
    print(f'Reading {args.images} training images …', flush=True)
    images = calibration_images(cfg, model, args.images)
    # Their images differ in size.
    pads = any(hasattr(model, name) for name in ('bbox_head', 'rpn_head'))
    if pads:
        images = [padded(image, size) for image in images]

    with tempfile.TemporaryDirectory() as folder:
        exported, source, quantized = (
            Path(folder, f'{name}.onnx') for name in ('exported', 'float', 'int8')
        )
        export_onnx(
            model, torch.randn(1, *shape), exported, metadata=preprocessing(cfg)
        )
        pairs = prepare(exported, source, args.equalize)
        networks = {'float32': OnnxNetwork(source, pads)}
        networks['float32'](images[0])  # Raises for images of another size.
        print(f'Calibrating ({args.calibration}) …', flush=True)
        quantize_onnx(
            source,
            quantized,
            images,
            not args.per_tensor,
            args.activations,
            args.calibration,
            args.reduce_range,
        )
        networks['INT8'] = OnnxNetwork(quantized, pads)
        metrics = {}
        for name, network in networks.items():
            print(f'Testing {name} …', flush=True)
            with network_from(model, network):
                metrics[name] = evaluate(cfg, model)
        print('Comparing the layers …', flush=True)
        losses = layer_losses(source, quantized, images[:LAYER_IMAGES])
        seconds = median_seconds(
            [
                lambda network=network: network(images[0])
                for network in networks.values()
            ]
        )
        sizes = [os.path.getsize(path) / 1e6 for path in (source, quantized)]
        data = quantized.read_bytes()
    with atomic_write(args.out) as file:
        file.write_bytes(data)

    figures = dict(
        metrics=metrics,
        latency_ms={name: 1000 * time for name, time in zip(networks, seconds)},
        megabytes=dict(zip(networks, sizes)),
        equalized_pairs=pairs,
        layers=[loss._asdict() for loss in losses],
    )
    if args.json is not None:
        with atomic_write(args.json) as file:
            file.write_text(json.dumps(figures, indent=2) + '\n')

    measured = {
        **{key: [metrics[n][key] for n in networks] for key in metrics['float32']},
        'latency (ms)': list(figures['latency_ms'].values()),
        'size (MB)': sizes,
    }
    rows = [
        (name, f'{before:.2f}', f'{after:.2f}', f'{after - before:+.2f}')
        for name, (before, after) in measured.items()
    ]
    kind = 'one scale a kernel' if args.per_tensor else 'one scale a channel'
    print(f'\nINT8 by ONNX Runtime, {kind}, calibrated with {len(images)} images,')
    if args.equalize:
        print(f'{pairs} pairs of convs equalized,')
    print(f'one image of {size[0]}x{size[1]} on {torch.get_num_threads()} threads:')
    print(format_table(('', *networks, 'difference'), rows))
    print_losses(losses, args.worst)
    print(f'Wrote {args.out}.')
    return figures


if __name__ == '__main__':
    main()
