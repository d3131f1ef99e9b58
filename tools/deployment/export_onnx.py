"""Writes a trained network as an ONNX file, and checks it with ONNX Runtime.

The checkpoint is of the training form, which is switched first, or deployed. The file
takes normalised images, in batches of any length, and gives the logits of a classifier
or a segmenter, or the maps of a detector's dense head (the first stage's, and the
features, of a two-stage one). Its metadata say how images are resized, cropped and
normalised, and name the classes.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_config_options, add_shape


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(
        __doc__, 'my_config.py work_dirs/my_config/epoch_30.pth network.onnx'
    )
    parser.add_argument('config', help='the config, of either form')
    parser.add_argument('checkpoint', help='the checkpoint, of either form')
    parser.add_argument('out', help='the ONNX file to write')
    parser.add_argument(
        '--exporter',
        choices=('torchscript', 'dynamo'),
        default='torchscript',
        help="PyTorch's exporter (default: torchscript); dynamo needs onnxscript",
    )
    add_shape(parser, 'images of the file (default: as the test images, or 224)')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference, relative to the largest output (default: 1e-4)',
    )
    parser.add_argument('--json', help='a file for the figures')
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import torch

from mmorepa.analysis import largest_difference
from mmorepa.analysis.complexity import count_bytes
from mmorepa.analysis.timing import busy_warning, least_seconds
from mmorepa.cli import one_line_errors
from mmorepa.converters import read_checkpoint
from mmorepa.deployment import dataset_meta, load_deployed
from mmorepa.deployment.inputs import image_shape, test_batch
from mmorepa.deployment.networks import DeployedNetwork
from mmorepa.deployment.onnx_files import OnnxNetwork, export_onnx, preprocessing
from mmorepa.hub import get_config
from mmorepa.utils.files import atomic_write, check_outputs, write_json
from mmorepa.utils.requirements import require
from mmorepa.utils.tables import counted, format_table


@one_line_errors()
@torch.no_grad()
def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    check_outputs([args.out, args.json], [args.config, args.checkpoint])
    for package in ('onnx', 'onnxruntime'):
        require(package)
    cfg = get_config(args.config, args.cfg_options)
    checkpoint = read_checkpoint(args.checkpoint)
    model = load_deployed(cfg, checkpoint)
    batch = test_batch(cfg)
    shape = image_shape(model, batch, args.shape)
    images = {
        'one random image': torch.randn(1, *shape),
        'three random images': torch.randn(3, *shape),
    }
    if batch is not None and shape == image_shape(model, batch):
        images['test images'] = model.data_preprocessor(batch, False)['inputs']
    network = DeployedNetwork(model).eval()
    image = images['one random image']

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'network.onnx')
        print(f'Exporting by {args.exporter} …', flush=True)
        classes = dataset_meta(cfg, checkpoint).get('classes')
        metadata = preprocessing(cfg, shape[0], classes)
        export_onnx(model, image, file, args.exporter, metadata=metadata)
        exported = OnnxNetwork(file)
        differences = {
            kind: largest_difference(list(network(batch)), exported(batch))
            for kind, batch in images.items()
        }
        worst = max(difference.relative for difference in differences.values())
        if not worst <= args.tolerance:
            raise SystemExit(
                f'error: ONNX Runtime differs from PyTorch by {worst:.2e} of the '
                f'largest output, tolerance {args.tolerance:.0e}; nothing was written'
            )
        seconds, core_share = least_seconds(
            [lambda: network(image), lambda: exported(image)]
        )
        data = file.read_bytes()
    with atomic_write(args.out) as file:
        file.write_bytes(data)

    sizes = (count_bytes(model), len(data))
    names = ('PyTorch', 'ONNX Runtime')
    figures = dict(
        forms={
            name: dict(latency_ms=1000 * time, megabytes=bytes_ / 1e6)
            for name, time, bytes_ in zip(names, seconds, sizes)
        },
        core_share=core_share,
        differences={kind: d._asdict() for kind, d in differences.items()},
        outputs=list(exported.names),
    )
    write_json(figures, args.json)

    rows = [
        (name, f'{form["latency_ms"]:.2f}', f'{form["megabytes"]:.2f}')
        for name, form in figures['forms'].items()
    ]
    threads = counted(torch.get_num_threads(), 'thread')
    print(f'\nOne image of {shape[1]}x{shape[2]}, on {threads}:')
    print(format_table(('deployed network', 'latency (ms)', 'size (MB)'), rows))
    if warning := busy_warning(core_share):
        print(warning)
    if hasattr(model, 'roi_head'):
        print('The second stage is in the size of PyTorch, and not in the file.')
    for kind, difference in differences.items():
        print(f'Largest difference for {kind}: {difference}.')
    print(f'Wrote {args.out}: {", ".join(exported.names)}.')
    return figures


if __name__ == '__main__':
    main()
