"""Quantizes a trained network to INT8, and tells what that costs, layer by layer.

After training: weights and activations become 8 bits wide, with ranges from training
images. The float network and the INT8 network are tested by the config's own evaluator
on its validation data. ONNX Runtime writes an ONNX file, torchao a program of PyTorch.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
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
    parser.add_argument(
        '--worst',
        type=positive,
        default=10,
        help='how many of the layers that lose most are printed (default: 10)',
    )
    parser.add_argument('--json', help='a file for all figures, of every layer')
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.backend == 'torchao' and (
        args.per_tensor
        or args.equalize
        or args.calibration != 'average'
        or args.activations != 'uint8'
    ):
        parser.error(
            '--per-tensor, --equalize, --calibration and --activations are options of '
            'onnxruntime, not of torchao'
        )
    return args


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import torch
from mmengine.config import Config
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
from mmorepa.deployment.networks import Network, network_from, padded, require
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx, preprocessing
from mmorepa.deployment.pt2e import ProgramNetwork, export_program, quantize_program
from mmorepa.runs import check_data_folders, read_config
from mmorepa.utils.files import atomic_write, check_outputs, write_json
from mmorepa.utils.tables import counted, format_table

# Their outputs are kept in memory for the comparison of the layers.
LAYER_IMAGES = 8
NAMES = FLOAT, INT8 = 'float32', 'INT8'


class Deployed(NamedTuple):
    """What is quantized.

    Args:
        cfg (Config): Its config.
        model (nn.Module): In eval mode.
        image (Tensor): Shape (1, C, H, W), of the size that the file takes.
        pads (bool): Whether smaller images are padded, as those of detectors are.
        classes (Sequence[str], optional): Their names.
    """

    cfg: Config
    model: nn.Module
    image: Tensor
    pads: bool
    classes: Optional[Sequence[str]]


class Quantized(NamedTuple):
    """What a backend made.

    Args:
        networks (dict[str, Network]): In float and in INT8.
        files (dict[str, Path]): Of both.
        losses (list[LayerLoss]): Of the layers, where the backend tells them.
        pairs (int): The convs that were equalized.
    """

    networks: dict[str, Network]
    files: dict[str, Path]
    losses: list[LayerLoss]
    pairs: int


def by_onnxruntime(
    network: Deployed, images: list[Tensor], folder: Path, args: argparse.Namespace
) -> Quantized:
    """Exports the model as an ONNX file, and quantizes that."""
    exported = folder / 'exported.onnx'
    float32, int8 = files = [folder / f'{name}.onnx' for name in NAMES]
    about = preprocessing(network.cfg, network.image.shape[1], network.classes)
    try:
        export_onnx(network.model, network.image, exported, metadata=about)
    except ValueError as error:
        raise ValueError(
            f'ONNX Runtime cannot quantize this model, --backend torchao may: {error}'
        ) from error
    pairs = prepare(exported, float32, args.equalize)
    networks = [OnnxNetwork(float32, network.pads)]
    networks[0](images[0])  # Raises for images of another size.
    quantize_onnx(
        float32,
        int8,
        images,
        not args.per_tensor,
        args.activations,
        args.calibration,
        args.reduce_range,
    )
    networks.append(OnnxNetwork(int8, network.pads))
    modules = [name for name, _ in network.model.named_modules()]
    losses = layer_losses(float32, int8, images[:LAYER_IMAGES], modules)
    return Quantized(dict(zip(NAMES, networks)), dict(zip(NAMES, files)), losses, pairs)


def by_torchao(
    network: Deployed, images: list[Tensor], folder: Path, args: argparse.Namespace
) -> Quantized:
    """Exports the model as a program of PyTorch, and quantizes that."""
    program = export_program(network.model, network.image)
    networks = [ProgramNetwork(program, *network[1:4])]
    networks[0](images[0])  # Raises for images of another size.
    quantized = quantize_program(program, images, args.reduce_range)
    networks.append(ProgramNetwork(quantized, *network[1:4]))
    files = [folder / f'{name}.pt2' for name in NAMES]
    for each, path in zip((program, quantized), files):
        torch.export.save(each, path)
    return Quantized(dict(zip(NAMES, networks)), dict(zip(NAMES, files)), [], 0)


class Backend(NamedTuple):
    """A library that quantizes.

    Args:
        text (str): Its name.
        quantize (Callable): Its function.
        packages (tuple[str, ...]): What it needs.
        is_timed (bool): Whether its networks run in INT8 as they are.
    """

    text: str
    quantize: Callable[..., Quantized]
    packages: tuple[str, ...]
    is_timed: bool


BACKENDS = dict(
    onnxruntime=Backend('ONNX Runtime', by_onnxruntime, ('onnx', 'onnxruntime'), True),
    torchao=Backend('torchao', by_torchao, ('torchao',), False),
)


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


def print_losses(losses: list[LayerLoss], most: int) -> None:
    """The layers whose outputs lose most, the worst first."""
    # NaN cannot be ranked.
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
    backend = BACKENDS[args.backend]
    for package in backend.packages:
        require(package)
    cfg = read_config(args.config, args.cfg_options)
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
        classes = dataset_meta(cfg, checkpoint).get('classes')
        deployed = Deployed(cfg, model, torch.randn(1, *shape), pads, classes)
        made = backend.quantize(deployed, images, Path(folder), args)
        metrics = {}
        for name, network in made.networks.items():
            print(f'Testing {name} …', flush=True)
            with network_from(model, network):
                metrics[name] = evaluate(cfg, model)
        seconds, core_share = [], None
        if backend.is_timed:
            seconds, core_share = least_seconds(
                [partial(network, images[0]) for network in made.networks.values()]
            )
        sizes = [path.stat().st_size / 1e6 for path in made.files.values()]
        data = made.files[INT8].read_bytes()
    with atomic_write(args.out) as file:
        file.write_bytes(data)

    figures = dict(
        metrics=metrics,
        latency_ms={name: 1000 * time for name, time in zip(NAMES, seconds)},
        core_share=core_share,
        megabytes=dict(zip(NAMES, sizes)),
        equalized_pairs=made.pairs,
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
    if backend.is_timed:
        measured['latency (ms)'] = list(figures['latency_ms'].values())
    rows = [(name, *in_digits(*values)) for name, values in measured.items()]
    kind = 'one scale a kernel' if args.per_tensor else 'one scale a channel'
    number = counted(len(images), 'image')
    print(f'\nINT8 by {backend.text}, {kind}, calibrated with {number},')
    if args.equalize:
        print(f'{counted(made.pairs, "pair")} of convs equalized,')
    threads = f' on {counted(torch.get_num_threads(), "thread")}'
    print(f'one image of {shape[1]}x{shape[2]}{threads if backend.is_timed else ""}:')
    print(format_table(('', *NAMES, 'difference'), rows))
    if backend.is_timed and (warning := busy_warning(core_share)):
        print(warning)
    if made.losses:
        print_losses(made.losses, args.worst)
    print(f'Wrote {args.out}.')
    return figures


if __name__ == '__main__':
    main()
