"""Trains a classifier, a detector or a segmenter from its config."""

import argparse
import sys
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parent))
from start import Parser, add_common_arguments


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'my_config.py')
    parser.add_argument('config', help='the config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or, without one, from the last whole one in '
        'the work folder',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--no-validate', action='store_true', help='do not validate while training'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the actual batch size',
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='start the workers of the dataloaders anew for every epoch',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

sys.path.append(str(Path(__file__).resolve().parent / 'analysis_tools'))
from charts import write_csv
from mmengine.dist import is_main_process
from training_curves import plot, read_run, table_of

from mmorepa.cli import load_config, one_line_errors
from mmorepa.runs import (
    add_hook,
    check_data_folders,
    check_start,
    find_start,
    keep_few_checkpoints,
    make_runner,
    name_broken_images,
    set_up_distributed_cpu,
    use_amp,
)


def draw_results(folder: Path) -> None:
    """Draws the curves of a training, if it has logged any."""
    try:
        run = read_run(folder)
    except (FileNotFoundError, ValueError) as error:
        print(f'No curves are drawn: {error}.')
        return
    plot([run], folder / 'results.png')
    write_csv(table_of([run]), folder / 'results.csv')
    print(f'The curves are in {folder / "results.png"}, their numbers in results.csv.')


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        use_amp(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr'):
            raise ValueError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
                'the config'
            )
        cfg.auto_scale_lr.enable = True
    if args.no_persistent_workers:
        for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(name):
                cfg[name].persistent_workers = False
    add_hook(cfg, 'CrashSafeHook')
    if not args.verbose:
        add_hook(cfg, 'ProgressHook')
    keep_few_checkpoints(cfg)
    check_data_folders(
        cfg, ('train',) if cfg.get('val_cfg') is None else ('train', 'val')
    )
    name_broken_images()
    checkpoint = find_start(cfg)
    set_up_distributed_cpu(cfg)
    runner = make_runner(cfg, args.verbose)
    check_start(runner, checkpoint)
    runner.train()
    if is_main_process():
        draw_results(Path(runner.work_dir))


if __name__ == '__main__':
    main()
