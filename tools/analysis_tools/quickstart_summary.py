"""Sums up what tools/quickstart.sh has done: a table, a JSON file, a chart."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from mmorepa.cli import one_line_errors
from mmorepa.utils.files import atomic_write, check_outputs
from mmorepa.utils.tables import format_table

ACCURACY = 'accuracy/top1'
INPUTS = ('switch.json', 'test.json', 'test_deploy.json')
# The plain twin, in its folder.
PLAIN_INPUTS = ('plain/switch.json', 'plain/test.json')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Sums up what the quickstart did.')
    parser.add_argument('work_dir', type=Path, help='the folder of the quickstart')
    parser.add_argument('--seconds', type=int, required=True, help='of the whole run')
    parser.add_argument('--training-seconds', type=int, required=True)
    parser.add_argument('--plain-training-seconds', type=int, required=True)
    return parser.parse_args(argv)


def summarize(
    work_dir: Path, seconds: int, training_seconds: int, plain_training_seconds: int
) -> dict:
    """Collects the figures from the files that the tools have written."""
    switch, test, test_deploy = (_read(work_dir / name) for name in INPUTS)
    plain_switch, plain_test = (_read(work_dir / name) for name in PLAIN_INPUTS)
    before, after = switch['training_form'], switch['deployed']
    plain = plain_switch['deployed']
    return dict(
        train_top1=test[ACCURACY],
        deploy_top1=test_deploy[ACCURACY],
        plain_top1=plain_test[ACCURACY],
        max_abs_logit_diff=switch['differences']['test images']['absolute'],
        params_train=before['params'],
        params_deploy=after['params'],
        params_plain=plain['params'],
        latency_ms_train_form=before['latency_ms'],
        latency_ms_deploy=after['latency_ms'],
        latency_ms_plain=plain['latency_ms'],
        training_seconds=training_seconds,
        plain_training_seconds=plain_training_seconds,
        seconds=seconds,
    )


def read_curves(train_dir: Path) -> tuple[list, list]:
    """(epochs, losses) of training and (epochs, accuracies) of validation."""
    files = sorted(train_dir.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(f'no scalars.json under {train_dir}')
    records = [json.loads(line) for line in files[-1].read_text().splitlines()]
    losses = [r for r in records if 'loss' in r]
    steps_per_epoch = losses[-1]['step'] / losses[-1]['epoch']
    return (
        [(r['step'] / steps_per_epoch, r['loss']) for r in losses],
        [(r['step'], r[ACCURACY]) for r in records if ACCURACY in r],
    )


def plot(
    curves: tuple[list, list], plain: tuple[list, list], summary: dict, path: Path
) -> None:
    """Draws loss and accuracy over the epochs, side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    for (losses, accuracies), colour, name in (
        (plain, 'black', 'plain'),
        (curves, 'tab:blue', 'OREPA, training form'),
    ):
        left.plot(*zip(*losses), color=colour, label=name)
        right.plot(*zip(*accuracies), marker='.', color=colour, label=name)
    left.set(title='Training loss', xlabel='epoch', yscale='log')
    right.axhline(
        summary['deploy_top1'],
        color='tab:orange',
        linestyle='--',
        label=f'OREPA, deployed: {summary["deploy_top1"]:.2f} %',
    )
    right.set(title='Validation accuracy (top-1, %)', xlabel='epoch')
    right.legend(loc='lower right')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    figure.suptitle('ResNet-18 (slim) on handwritten digits')
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    curves, target = args.work_dir / 'curves.png', args.work_dir / 'summary.json'
    inputs = [args.work_dir / name for name in (*INPUTS, *PLAIN_INPUTS)]
    check_outputs([curves, target], inputs)
    summary = summarize(
        args.work_dir, args.seconds, args.training_seconds, args.plain_training_seconds
    )
    plot(
        read_curves(args.work_dir / 'train'),
        read_curves(args.work_dir / 'plain/train'),
        summary,
        curves,
    )
    with atomic_write(target) as file:
        file.write_text(json.dumps(summary, indent=2) + '\n')

    headers = ('', 'training form', 'deployed', 'plain twin')
    rows = [
        ('top-1 accuracy (%)', '.2f', 'train_top1', 'deploy_top1', 'plain_top1'),
        ('parameters', ',d', 'params_train', 'params_deploy', 'params_plain'),
        (
            'latency (ms)',
            '.2f',
            *('latency_ms_train_form', 'latency_ms_deploy', 'latency_ms_plain'),
        ),
    ]
    table = [
        (name, *(format(summary[key], spec) for key in keys))
        for name, spec, *keys in rows
    ]
    seconds = (str(args.training_seconds), '', str(args.plain_training_seconds))
    print(format_table(headers, [*table, ('training (s)', *seconds)]))
    print(
        f'Largest difference of a logit: {summary["max_abs_logit_diff"]:.1e}. '
        f'Everything took {args.seconds} s.'
    )
    print(f'Figures: {target}   Curves: {curves}')


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


if __name__ == '__main__':
    main()
