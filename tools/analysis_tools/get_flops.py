"""Counts parameters and FLOPs of both forms of a config's model.

MMPretrain's own get_flops.py counts the fold of a training form as if it were done for
every image: 79 M for the quickstart's network, where its convs take 2.8 M. A fold is
left out here, since one serves many images. Both forms then differ by their BatchNorms,
and by branches that run on the images, as those of DBB and RepVGG do.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_config_options, add_shape


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'my_config.py --shape 224')
    parser.add_argument('config', help='the config, in either form')
    add_shape(parser, 'the image (default: as the test images, or 224)')
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import torch

from mmorepa import is_switchable, switch_to_deploy
from mmorepa.analysis.complexity import count_bytes, count_gflops, count_parameters
from mmorepa.cli import one_line_errors
from mmorepa.deployment.inputs import image_shape, test_batch
from mmorepa.hub import get_config
from mmorepa.runs import build_model
from mmorepa.utils.tables import format_table


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    cfg = get_config(args.config, args.cfg_options)
    model = build_model(cfg)
    shape = image_shape(model, None if args.shape else test_batch(cfg), args.shape)
    forms = {'as in the config': model}
    if is_switchable(model):
        forms = {
            'training form': model,
            'deployed': switch_to_deploy(copy.deepcopy(model)),
        }
    image = torch.zeros(1, *shape)
    rows = [
        (
            name,
            f'{count_parameters(form):,}',
            f'{count_gflops(form, image):.4g}',
            f'{count_bytes(form) / 1e6:.2f}',
        )
        for name, form in forms.items()
    ]
    print(f'\nOne image of {shape[1]}x{shape[2]}; a multiply-add counts as one FLOP:')
    print(format_table(('form', 'parameters', 'GFLOPs', 'size (MB)'), rows))
    if hasattr(model, 'roi_head'):
        print('The second stage of the detector is counted for 84 boxes.')


if __name__ == '__main__':
    main()
