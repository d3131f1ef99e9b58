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
        '--backbone-only',
        action='store_true',
        help="write the backbone's weights alone, for init_cfg=dict(type='Pretrained')",
    )
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

from mmorepa.cli import one_line_errors
from mmorepa.converters import from_published, read_checkpoint, write_checkpoint
from mmorepa.utils.files import check_outputs


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    check_outputs([args.out], [args.source])
    checkpoint = read_checkpoint(args.source)
    result = from_published(checkpoint['state_dict'])
    meta, state_dict = result['meta'], result['state_dict']
    # The state of optimizer and scheduler belongs to parameters in another order.
    keys = ('epoch', 'arch', 'best_acc1')
    meta['published'] = {key: checkpoint[key] for key in keys if key in checkpoint}
    if args.backbone_only:
        result['state_dict'] = state_dict = {
            key.removeprefix('backbone.'): value
            for key, value in state_dict.items()
            if key.startswith('backbone.')
        }
    write_checkpoint(result, args.out)
    form = 'deployed form' if meta['deployed'] else 'training form'
    print(f'Wrote the {form} to {args.out}: {len(state_dict)} entries, all of them.')
    deploy = dict(deploy=True) if meta['deployed'] else {}
    print(f'It loads into backbone={dict(meta["backbone"], **deploy)}')
    if args.backbone_only:
        print(f"as init_cfg=dict(type='Pretrained', checkpoint={args.out!r})")


if __name__ == '__main__':
    main()
