"""Tests a checkpoint of a classifier, a detector or a segmenter."""

import argparse
import os
from collections.abc import Sequence
from typing import Optional

import mmengine
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults

from mmorepa.engine.config import (
    add_common_arguments,
    build_runner,
    load_config,
    one_line_errors,
    use_tta,
    use_visualization,
)
from mmorepa.utils.errors import CheckpointError


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Tests a checkpoint of a classifier, a detector or a segmenter.'
    )
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
        '--interval', type=int, default=1, help='draw every so many images'
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


def prepare(args: argparse.Namespace) -> Config:
    """The config that the flags ask for."""
    if not os.path.isfile(args.checkpoint):
        raise FileNotFoundError(f'no checkpoint at {args.checkpoint!r}')
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir is not None:
        use_visualization(cfg, args.show, args.show_dir, args.interval, args.wait_time)
    if args.tta:
        use_tta(cfg)
    if args.deploy:
        hooks = cfg.get('custom_hooks') or []
        if not any(hook['type'] == 'SwitchToDeployHook' for hook in hooks):
            cfg.custom_hooks = [*hooks, dict(type='SwitchToDeployHook')]
    return cfg


def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    with one_line_errors():
        runner = build_runner(prepare(args), ('test',))
    if args.out and args.out_item != 'metrics':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    with one_line_errors((CheckpointError,)):
        metrics = runner.test()
    if args.out and args.out_item == 'metrics' and is_main_process():
        mmengine.dump(metrics, args.out)
    return metrics


if __name__ == '__main__':
    main()
