"""Writes the deployed form of a training checkpoint, and shows what it gains.

Beside the checkpoint OUT.pth goes OUT_config.py, the config that builds this form:
`tools/test.py OUT_config.py OUT.pth` needs no flag.
"""

import argparse
import copy
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser, add_config_options, add_shape


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(
        __doc__, 'my_config.py work_dirs/my_config/epoch_30.pth deployed.pth'
    )
    parser.add_argument('config', help='the config of the training')
    parser.add_argument('checkpoint', help='the training checkpoint')
    parser.add_argument(
        'out', help='the deployed checkpoint to write; OUT_config.py goes beside it'
    )
    add_shape(
        parser,
        'image of the check with random input and of the figures (default: as the test '
        'images, or 224)',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference, relative to the largest output (default: 1e-4)',
    )
    parser.add_argument('--json', help='a file for the figures of the table')
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import torch

from mmorepa import switch_to_deploy
from mmorepa.analysis import largest_difference, network_outputs, raw_outputs
from mmorepa.analysis.complexity import count_bytes, count_gflops, count_parameters
from mmorepa.analysis.timing import busy_warning, least_seconds
from mmorepa.cli import one_line_errors
from mmorepa.converters import (
    deploy_checkpoint,
    load_training_form,
    read_checkpoint,
    write_checkpoint,
)
from mmorepa.deployment import loaded_by_config
from mmorepa.deployment.inputs import image_shape, test_batch
from mmorepa.hub import get_config
from mmorepa.runs import build_model
from mmorepa.utils.errors import OutputError
from mmorepa.utils.files import atomic_write, check_outputs, write_json
from mmorepa.utils.tables import counted, format_table

# By this variable, the tool knows a config that it wrote.
MARK = 'deployed_checkpoint'


def config_beside(out: str) -> str:
    """The name of the config that goes with a checkpoint.

    Raises:
        OutputError: If there is a config of this name that this tool did not write.
    """
    path = f'{os.path.splitext(out)[0]}_config.py'
    if os.path.isfile(path) and not re.search(
        rf'(?m)^{MARK} = ', Path(path).read_text(errors='replace')
    ):
        raise OutputError(
            f'the config that goes with {out!r} would take the place of {path!r}, '
            'which is yours; give another name to the checkpoint'
        )
    return path


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    inputs = [args.config, args.checkpoint]
    check_outputs([args.out, args.json], inputs)
    config = config_beside(args.out)
    check_outputs([args.out, config, args.json], inputs)
    cfg = get_config(args.config, args.cfg_options)
    checkpoint = read_checkpoint(args.checkpoint)
    training = build_model(cfg)
    load_training_form(training, checkpoint['state_dict'])
    result = deploy_checkpoint(training, checkpoint)

    problem = ''
    try:
        deployed_cfg, deployed = loaded_by_config(cfg, result['state_dict'])
    except ValueError as error:
        problem = str(error)
        deployed = switch_to_deploy(copy.deepcopy(training))
        deployed.load_state_dict(result['state_dict'])
    batch = test_batch(cfg)
    shape = image_shape(training, batch, args.shape)
    image = torch.randn(1, *shape)

    forms = (training, deployed)
    outputs = {'random input': [network_outputs(form, image) for form in forms]}
    if batch is not None:
        outputs['test images'] = [raw_outputs(form, batch) for form in forms]
    differences = {kind: largest_difference(*both) for kind, both in outputs.items()}
    worst = max(difference.relative for difference in differences.values())
    if not worst <= args.tolerance:
        raise SystemExit(
            f'error: the deployed form differs by {worst:.2e} of the largest output, '
            f'tolerance {args.tolerance:.0e}; nothing was written. Are the running '
            'variances of the checkpoint near zero, or its weights in half precision?'
        )
    seconds, core_share = least_seconds(
        [partial(network_outputs, form, image) for form in forms]
    )
    names = ('training_form', 'deployed')
    measured = {
        name: dict(
            params=count_parameters(form),
            gflops=count_gflops(form, image),
            latency_ms=latency * 1000,
            megabytes=count_bytes(form) / 1e6,
        )
        for name, form, latency in zip(names, forms, seconds)
    }
    figures = dict(
        **measured,
        core_share=core_share,
        differences={k: d._asdict() for k, d in differences.items()},
    )
    write_checkpoint(result, args.out)
    if not problem:
        deployed_cfg[MARK] = args.out
        # The folder of the training is none for tests of another form.
        deployed_cfg.pop('work_dir', None)
        with atomic_write(config) as file:
            deployed_cfg.dump(file)
    write_json(figures, args.json)

    rows = [
        (
            name.replace('_', ' '),
            f'{form["params"]:,}',
            f'{form["gflops"]:.4g}',
            f'{form["latency_ms"]:.2f}',
            f'{form["megabytes"]:.2f}',
        )
        for name, form in measured.items()
    ]
    headers = ('form', 'parameters', 'GFLOPs', 'latency (ms)', 'size (MB)')
    threads = counted(torch.get_num_threads(), 'thread')
    print(f'\nOne image of {shape[1]}x{shape[2]}, on {threads}:')
    print(format_table(headers, rows))
    if warning := busy_warning(core_share):
        print(warning)
    for kind, difference in differences.items():
        print(f'Largest difference for {kind}: {difference}.')
    if problem:
        print(f'Wrote {args.out}, and no config: {problem}.')
    else:
        print(f'Wrote {args.out} and {config}, which go together.')
    return figures


if __name__ == '__main__':
    main()
