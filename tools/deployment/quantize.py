"""Quantizes a trained network to INT8, and tells what that costs, layer by layer.

After training: weights and activations become 8 bits wide, with ranges from training
images. The float network and the INT8 network are tested by the config's own evaluator
on its validation data. ONNX Runtime writes an ONNX file, torchao a program of PyTorch.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_config_options, add_shape, positive


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(
        __doc__, 'my_config.py work_dirs/my_config/epoch_30.pth network_int8.onnx'
    )
    parser.add_argument('config', help='the config, of either form')
    parser.add_argument('checkpoint', help='the checkpoint, of either form')
    parser.add_argument('out', help='the file to write')
    parser.add_argument(
        '--backend',
        choices=('onnxruntime', 'torchao'),
        default='onnxruntime',
        help='what quantizes (default: onnxruntime); torchao takes no --per-tensor, '
        '--equalize, --calibration or --activations, and ranks no layers',
    )
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
        choices=('average', 'minmax', 'percentile'),
        default='average',
        help="how the ranges of activations are chosen: the mean of the images' own, "
        'the widest, or without the outermost 0.01 %% (default: average)',
    )
    parser.add_argument(
        '--activations',
        choices=('uint8', 'int8', 'uint16'),
        default='uint8',
        help='uint8 suits x86, int8 suits ARM and GPUs; uint16 loses less, '
        'and is slower than float (default: uint8)',
    )
    parser.add_argument(
        '--reduce-range',
        action='store_true',
        help='weights of 7 bits (activations, with torchao), for x86 without VNNI, '
        'where sums saturate',
    )
    add_shape(
        parser,
        'images of the file (default: as the test images, or 224); smaller images of '
        'detectors are padded',
    )
    parser.add_argument('--json', help='a file for all figures, of every layer')
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.backend == 'torchao':
        for name in ('per_tensor', 'equalize', 'calibration', 'activations'):
            if getattr(args, name) != parser.get_default(name):
                flag = name.replace('_', '-')
                parser.error(f'--{flag} is an option of onnxruntime, not of torchao')
    return args


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import torch
from torch import Tensor, nn

from mmorepa.analysis.timing import busy_warning, least_seconds
from mmorepa.cli import one_line_errors
from mmorepa.converters import read_checkpoint
from mmorepa.deployment import dataset_meta, load_deployed
from mmorepa.deployment.inputs import image_shape, test_batch
from mmorepa.deployment.int8 import (
    LayerLoss,
    calibration_images,
    evaluate,
    evaluation_phase,
    layer_losses,
    prepare,
    quantize_onnx,
)
from mmorepa.deployment.networks import Network, network_from, padded
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx, preprocessing
from mmorepa.deployment.pt2e import ProgramNetwork, export_program, quantize_program
from mmorepa.hub import get_config
from mmorepa.runs import check_data_folders
from mmorepa.utils.files import atomic_write, check_outputs, write_json
from mmorepa.utils.requirements import require
from mmorepa.utils.tables import counted, format_table

# Their outputs are kept in memory for the comparison of the layers.
LAYER_IMAGES = 8
# So many layers are printed.
MOST = 10
NAMES = FLOAT, INT8 = 'float32', 'INT8'


class Quantized(NamedTuple):
    """What a backend made, in float and in INT8; ``losses`` where it tells them."""

    networks: list[Network]
    files: list[Path]
    losses: list[LayerLoss]
    equalized_pairs: int


def by_onnxruntime(
    model: nn.Module,
    image: Tensor,
    images: list[Tensor],
    pads: bool,
    folder: Path,
    args: argparse.Namespace,
    about: dict,
) -> Quantized:
    """Exports the model as an ONNX file, and quantizes that."""
    exported = folder / 'exported.onnx'
    float32, int8 = files = [folder / f'{name}.onnx' for name in NAMES]
    try:
        export_onnx(model, image, exported, metadata=about)
    except ValueError as error:
        raise ValueError(
            f'ONNX Runtime cannot quantize this model, --backend torchao may: {error}'
        ) from error
    pairs = prepare(exported, float32, args.equalize)
    networks = [OnnxNetwork(float32, pads)]
    networks[0](images[0])  # Raises for images of another size.
    options = args.activations, args.calibration, args.reduce_range
    quantize_onnx(float32, int8, images, not args.per_tensor, *options)
    networks.append(OnnxNetwork(int8, pads))
    losses = layer_losses(float32, int8, images[:LAYER_IMAGES])
    return Quantized(networks, files, losses, pairs)


def by_torchao(
    model: nn.Module,
    image: Tensor,
    images: list[Tensor],
    pads: bool,
    folder: Path,
    args: argparse.Namespace,
    about: dict,
) -> Quantized:
    """Exports the model as a program of PyTorch, and quantizes that."""
    program = export_program(model, image)
    networks = [ProgramNetwork(program, model, image, pads)]
    networks[0](images[0])  # Raises for images of another size.
    quantized = quantize_program(program, images, args.reduce_range)
    networks.append(ProgramNetwork(quantized, model, image, pads))
    files = [folder / f'{name}.pt2' for name in NAMES]
    for each, path in zip((program, quantized), files):
        torch.export.save(each, path)
    return Quantized(networks, files, [], 0)


def saturates() -> bool:
    """Whether this CPU adds up products of 8 bits without VNNI."""
    if platform.machine() not in ('x86_64', 'AMD64'):
        return False
    try:
        return 'vnni' not in Path('/proc/cpuinfo').read_text()
    except OSError:
        return False


def in_digits(before: float, after: float) -> tuple[str, str, str]:
    """Both numbers and their difference, to four decimals where none exceeds 1."""
    form = '.2f' if max(abs(before), abs(after)) > 1 else '.4f'
    return f'{before:{form}}', f'{after:{form}}', f'{after - before:+{form}}'


def print_losses(losses: list[LayerLoss]) -> None:
    """The layers whose outputs lose most, the worst first."""
    # NaN cannot be ranked.
    ranked = sorted(
        losses, key=lambda loss: (loss.output_snr != loss.output_snr, loss.output_snr)
    )
    headers = ('layer', 'range', 'outlier', 'kernel SNR (dB)', 'output SNR (dB)')
    rows = [
        (name, f'{weight_range:.3g}', *(f'{value:.1f}' for value in others))
        for name, weight_range, *others in ranked[:MOST]
    ]
    print(f'\nThe layers that lose most, {len(rows)} of {len(losses)}:')
    print(format_table(headers, rows))
    print(
        'range: the largest weight. outlier: that of the widest channel over that of '
        'the\nmedian channel. SNR: signal over noise, a mean over channels; that of an '
        'output has\nthe errors of all layers before it, and is nan where the output '
        'is zero, or not\nquantized.'
    )


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    check_outputs([args.out, args.json], [args.config, args.checkpoint])
    is_onnx = args.backend == 'onnxruntime'
    for package in ('onnx', 'onnxruntime') if is_onnx else ('torchao',):
        require(package)
    cfg = get_config(args.config, args.cfg_options)
    checkpoint = read_checkpoint(args.checkpoint)
    model = load_deployed(cfg, checkpoint)
    check_data_folders(cfg, ('train', evaluation_phase(cfg)))
    shape = image_shape(model, test_batch(cfg), args.shape)
    if saturates() and not args.reduce_range:
        print('This CPU has no VNNI: if the accuracy falls, try --reduce-range.')
    print('Reading training images …', flush=True)
    images = calibration_images(cfg, model, args.images)
    print(f'Read {counted(len(images), "training image")}.')
    # Their images differ in size.
    pads = any(hasattr(model, name) for name in ('bbox_head', 'rpn_head'))
    if pads:
        images = [padded(image, shape[1:]) for image in images]

    with tempfile.TemporaryDirectory() as folder:
        print('Quantizing …', flush=True)
        image = torch.randn(1, *shape)
        about = preprocessing(
            cfg, shape[0], dataset_meta(cfg, checkpoint).get('classes')
        )
        quantize = by_onnxruntime if is_onnx else by_torchao
        made = quantize(model, image, images, pads, Path(folder), args, about)
        metrics = {}
        for name, network in zip(NAMES, made.networks):
            print(f'Testing {name} …', flush=True)
            with network_from(model, network):
                metrics[name] = evaluate(cfg, model)
        seconds, core_share = [], None
        if is_onnx:  # A program of torchao does not run in INT8 as it is.
            seconds, core_share = least_seconds(
                [partial(network, images[0]) for network in made.networks]
            )
        sizes = [path.stat().st_size / 1e6 for path in made.files]
        data = made.files[1].read_bytes()
    with atomic_write(args.out) as file:
        file.write_bytes(data)

    figures = dict(
        metrics=metrics,
        latency_ms={name: 1000 * time for name, time in zip(NAMES, seconds)},
        core_share=core_share,
        megabytes=dict(zip(NAMES, sizes)),
        equalized_pairs=made.equalized_pairs,
        # JSON knows no NaN.
        layers=[
            {key: None if value != value else value for key, value in loss.items()}
            for loss in (loss._asdict() for loss in made.losses)
        ],
    )
    write_json(figures, args.json)

    measured = {
        **{key: [metrics[n][key] for n in NAMES] for key in metrics[FLOAT]},
        'size (MB)': sizes,
    }
    where = ''
    if is_onnx:
        measured['latency (ms)'] = list(figures['latency_ms'].values())
        where = f' on {counted(torch.get_num_threads(), "thread")}'
    rows = [(name, *in_digits(*values)) for name, values in measured.items()]
    library = 'ONNX Runtime' if is_onnx else 'torchao'
    kind = 'one scale a kernel' if args.per_tensor else 'one scale a channel'
    number = counted(len(images), 'image')
    print(f'\nINT8 by {library}, {kind}, calibrated with {number},')
    if args.equalize:
        print(f'{counted(made.equalized_pairs, "pair")} of convs equalized,')
    print(f'one image of {shape[1]}x{shape[2]}{where}:')
    print(format_table(('', *NAMES, 'difference'), rows))
    if is_onnx and (warning := busy_warning(core_share)):
        print(warning)
    if made.losses:
        print_losses(made.losses)
    print(f'Wrote {args.out}.')
    return figures


if __name__ == '__main__':
    main()
