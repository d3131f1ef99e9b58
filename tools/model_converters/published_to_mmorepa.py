"""Translates checkpoints of the published OREPA training code."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'published.pth converted.pth')
    parser.add_argument('source', metavar='IN', help='the checkpoint to read')
    parser.add_argument('out', metavar='OUT', help='the checkpoint to write')
    parser.add_argument(
        '--arch',
        metavar='NAME',
        help='the network, such as ResNet-50; by default found from the weights',
    )
    parser.add_argument(
        '--block',
        choices=('plain', 'none', 'dbb', 'orepa', 'repvgg'),
        help='its block type, by default found as well',
    )
    parser.add_argument(
        '--backbone-only',
        action='store_true',
        help="write the backbone's weights alone, for init_cfg=dict(type='Pretrained')",
    )
    args = parser.parse_args(argv)
    if args.arch is not None and args.block is None:
        parser.error('--arch needs --block')
    if args.block is not None and args.arch is None:
        parser.error('--block needs --arch')
    return args


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

from mmorepa.cli import one_line_errors
from mmorepa.converters import (
    backbone_of,
    from_published,
    read_checkpoint,
    write_checkpoint,
)
from mmorepa.utils.files import check_outputs


def translate(checkpoint: dict, backbone: Optional[dict], backbone_only: bool) -> dict:
    """From the published layout to ours."""
    result = from_published(checkpoint['state_dict'], backbone)
    # The state of optimizer and scheduler belongs to parameters in another order.
    keys = ('epoch', 'arch', 'best_acc1')
    result['meta']['published'] = {k: checkpoint[k] for k in keys if k in checkpoint}
    if backbone_only:
        result['state_dict'] = {
            key.removeprefix('backbone.'): value
            for key, value in result['state_dict'].items()
            if key.startswith('backbone.')
        }
    return result


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    check_outputs([args.out], [args.source])
    backbone = None if args.arch is None else backbone_of(args.arch, args.block)
    checkpoint = read_checkpoint(args.source)
    result = translate(checkpoint, backbone, args.backbone_only)
    write_checkpoint(result, args.out)
    meta = result['meta']
    form = 'deployed' if meta['deployed'] else 'training form'
    print(
        f'Wrote {meta["architecture"]} ({form}) to {args.out}: '
        f'{len(result["state_dict"])} entries, all of them matched.'
    )
    settings = (
        dict(meta['backbone'], deploy=True) if meta['deployed'] else meta['backbone']
    )
    print(f'It loads into backbone={settings}')
    if args.backbone_only:
        print(f"as init_cfg=dict(type='Pretrained', checkpoint={args.out!r})")


if __name__ == '__main__':
    main()
