"""Counts parameters and FLOPs of both forms of a config's model.

MMPretrain's own get_flops.py counts the fold of a training form as if it were done for
every image: 79 M for the quickstart's network, where its convs take 2.8 M. A fold is
left out here, since one serves many images. Both forms then differ by their BatchNorms,
and by branches that run on the images, as those of DBB and RepVGG do.
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Optional

import torch

from mmorepa import is_switchable, switch_to_deploy
from mmorepa.analysis.complexity import count_bytes, count_gflops, count_parameters
from mmorepa.cli import add_config_options, one_line_errors, positive
from mmorepa.deployment.inputs import image_shape, test_batch
from mmorepa.engine.config import build_model, read_config
from mmorepa.utils.tables import format_table


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='the config, in either form')
    parser.add_argument(
        '--shape',
        nargs='+',
        type=positive,
        metavar='PIXELS',
        help='height and width of the image, or one number for both; by default those '
        'of the test images, or 224 without data',
    )
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.shape is not None and len(args.shape) > 2:
        parser.error(f'--shape takes one or two numbers, found {len(args.shape)}')
    return args


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options)
    model = build_model(cfg)
    if args.shape is None:
        shape = image_shape(model, test_batch(cfg))
    else:
        shape = image_shape(model, None, (args.shape[0], args.shape[-1]))
    forms = {'as in the config': model}
    if is_switchable(model):
        forms = {
            'training form': model,
            'deployed': switch_to_deploy(copy.deepcopy(model)),
        }
    image = torch.zeros(1, *shape)
    figures = {
        name: dict(
            params=count_parameters(form),
            gflops=count_gflops(form, image),
            megabytes=count_bytes(form) / 1e6,
        )
        for name, form in forms.items()
    }
    rows = [
        (
            name,
            f'{found["params"]:,}',
            f'{found["gflops"]:.4g}',
            f'{found["megabytes"]:.2f}',
        )
        for name, found in figures.items()
    ]
    print(f'\nOne image of {shape[1]}x{shape[2]}; a multiply-add counts as one FLOP:')
    print(format_table(('form', 'parameters', 'GFLOPs', 'size (MB)'), rows))
    if hasattr(model, 'roi_head'):
        print('The second stage of the detector is counted for 84 boxes.')
    return figures


if __name__ == '__main__':
    main()
