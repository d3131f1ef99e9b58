"""Converts the checkpoint of a plain classifier to one of an OREPA classifier."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_config_options, add_shape


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(
        __doc__, 'resnet50.pth imagenet/resnet50-orepa_4xb64_in1k started.pth'
    )
    parser.add_argument(
        'source',
        metavar='SOURCE',
        help='the checkpoint file of the plain network: of torchvision, timm or '
        'mmpretrain',
    )
    parser.add_argument(
        'config',
        metavar='CONFIG',
        help='the config of the classifier; deploy=True in its backbone gives a '
        'deployed checkpoint',
    )
    parser.add_argument('out', metavar='OUT', help='the checkpoint to write')
    add_shape(parser, 'image of the check with random input (default: 224)')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference, relative to the largest output (default: 1e-4)',
    )
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import torch

from mmorepa import __version__
from mmorepa.analysis import largest_difference, network_outputs
from mmorepa.backbones import OREPARepVGG
from mmorepa.backbones.checks import check_style
from mmorepa.cli import one_line_errors
from mmorepa.converters import read_checkpoint, start_from_plain, write_checkpoint
from mmorepa.hub import get_config
from mmorepa.layers import is_switchable
from mmorepa.runs import build_model
from mmorepa.utils.files import check_outputs


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    check_outputs([args.out], [args.source, args.config])
    cfg = get_config(args.config, args.cfg_options)
    checkpoint = read_checkpoint(args.source)
    model = build_model(cfg)
    count = start_from_plain(model, checkpoint['state_dict'])
    check_style(model.backbone, args.source)
    block = 'repvgg' if isinstance(model.backbone, OREPARepVGG) else 'plain'
    plain = dict(block=block, block_cfg=None, stem_block=None, stem_block_cfg=None)
    cfg.model.backbone.update(plain, deploy=False)
    twin = build_model(cfg)
    start_from_plain(twin, checkpoint['state_dict'])

    channels = cfg.model.backbone.get('in_channels', 3)
    height, width = args.shape or (224, 224)
    image = torch.randn(2, channels, height, width)
    difference = largest_difference(
        network_outputs(twin, image), network_outputs(model, image)
    )
    if not difference.relative <= args.tolerance:
        raise SystemExit(
            f'error: the outputs differ by {difference.relative:.2e} of the largest, '
            f'tolerance {args.tolerance:.0e}; nothing was written. Are the running '
            'variances of the checkpoint near zero, or its weights in half precision?'
        )
    meta = checkpoint.get('meta') or {}
    # The rest tells of the training of the plain network.
    meta = {key: meta[key] for key in ('dataset_meta', 'CLASSES') if key in meta}
    deployed = not is_switchable(model)
    meta.update(mmorepa_version=__version__, deployed=deployed)
    result = dict(meta=meta, state_dict=model.state_dict())
    write_checkpoint(result, args.out)
    if deployed:
        print(f'{count} convs took plain kernels, BatchNorm folded in.')
    else:
        print(f'{count} convs start from plain kernels.')
    print(f'Largest difference for random input of {height}x{width}: {difference}.')
    print(f'Wrote {args.out}.')


if __name__ == '__main__':
    main()
