"""Tests a checkpoint of a classifier, a detector or a segmenter."""

import argparse
import os
import sys
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parent))
from start import Parser, add_common_arguments, positive


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'my_config.py work_dirs/my_config/epoch_30.pth')
    parser.add_argument('config', help='the config file')
    parser.add_argument('checkpoint', help='the checkpoint file')
    parser.add_argument(
        '--deploy',
        action='store_true',
        help='switch the model to its plain form first, and check that nothing changes',
    )
    parser.add_argument(
        '--out', help='a file for the results: .pkl, or .json for metrics'
    )
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        help="what --out holds; 'pred' (the predictions, in a .pkl) by default",
    )
    parser.add_argument('--amp', action='store_true', help='test in mixed precision')
    parser.add_argument('--show-dir', help='a folder for images of the predictions')
    parser.add_argument('--show', action='store_true', help='show them in windows')
    parser.add_argument(
        '--interval', type=positive, default=1, help='draw every so many images'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that a window stays'
    )
    parser.add_argument(
        '--tta', action='store_true', help='average over augmented copies of an image'
    )
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.out is None and args.out_item is not None:
        parser.error('--out-item needs --out')
    if args.out and args.out_item != 'metrics' and not args.out.endswith('.pkl'):
        parser.error('predictions are written as .pkl; for metrics: --out-item metrics')
    return args


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import mmengine
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults

from mmorepa.cli import load_config, one_line_errors
from mmorepa.converters import read_checkpoint
from mmorepa.runs import (
    add_hook,
    check_data_folders,
    check_start,
    make_runner,
    name_broken_images,
    set_up_distributed_cpu,
    use_tta,
    use_visualization,
)
from mmorepa.utils.files import atomic_write, check_outputs


class _DumpWhole(DumpResults):
    """MMEngine's ``DumpResults``, with an atomic write."""

    def compute_metrics(self, results: list) -> dict:
        with atomic_write(self.out_file_path) as file:
            mmengine.dump(results, file)
        return {}


def prepare(args: argparse.Namespace) -> Config:
    """The config that the flags ask for."""
    check_outputs([args.out], [args.config, args.checkpoint])
    if not os.path.isfile(args.checkpoint):
        raise FileNotFoundError(f'no checkpoint at {args.checkpoint!r}')
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir is not None:
        options = dict(interval=args.interval, wait_time=args.wait_time)
        use_visualization(cfg, args.show_dir, show=args.show, **options)
    if args.tta:
        use_tta(cfg)
    if args.deploy:
        add_hook(cfg, 'SwitchToDeployHook')
    if not args.verbose:
        add_hook(cfg, 'ProgressHook')
    return cfg


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> dict:
    args = parse_args(argv)
    cfg = prepare(args)
    check_data_folders(cfg, ('test',))
    name_broken_images()
    checkpoint = read_checkpoint(cfg.load_from)
    set_up_distributed_cpu(cfg)
    runner = make_runner(cfg, args.verbose)
    check_start(runner, checkpoint)
    if args.out and args.out_item != 'metrics':
        runner.test_evaluator.metrics.append(_DumpWhole(out_file_path=args.out))
    metrics = runner.test()
    if args.out and args.out_item == 'metrics' and is_main_process():
        with atomic_write(args.out) as file:
            mmengine.dump(metrics, file)
    return metrics


if __name__ == '__main__':
    main()
