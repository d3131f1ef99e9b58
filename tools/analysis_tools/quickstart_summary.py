"""Sums up what tools/quickstart.sh has done: a table, a JSON file, a chart."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
import start  # noqa: F401  Sets how threads wait, before PyTorch is loaded.

# isort: split

import torch
from charts import SERIES, panels, save
from training_curves import Run, draw_losses, draw_metric, plot_branches, read_run

from mmorepa.analysis import network_outputs
from mmorepa.analysis.timing import busy_warning, least_seconds
from mmorepa.cli import one_line_errors
from mmorepa.converters import load_training_form, read_checkpoint
from mmorepa.deployment import load_deployed
from mmorepa.deployment.inputs import image_shape, test_batch
from mmorepa.hub import get_config
from mmorepa.runs import build_model
from mmorepa.utils.files import check_outputs, write_json
from mmorepa.utils.tables import format_table

ACCURACY = 'accuracy/top1'
# What the tools have written; the plain twin has a folder of its own.
INPUTS = (
    *('switch.json', 'test.json', 'test_deploy.json'),
    *('plain/switch.json', 'plain/test.json'),
)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Sums up what the quickstart did.')
    parser.add_argument('work_dir', type=Path, help='the folder of the quickstart')
    parser.add_argument('config', help='the config of the training form')
    parser.add_argument('checkpoint', help='the checkpoint of the training form')
    parser.add_argument('--seconds', type=int, required=True, help='of the whole run')
    parser.add_argument('--training-seconds', type=int, required=True)
    parser.add_argument('--plain-training-seconds', type=int, required=True)
    return parser.parse_args(argv)


def time_forms(args: argparse.Namespace) -> tuple[list[float], float]:
    """Times training form, deployed form and plain twin: see :func:`least_seconds`."""
    cfg = get_config(args.config)
    training = build_model(cfg)
    load_training_form(training, read_checkpoint(args.checkpoint)['state_dict'])
    models = [training]
    for folder in (args.work_dir, args.work_dir / 'plain'):
        deployed = get_config(str(folder / 'deploy_config.py'))
        weights = read_checkpoint(str(folder / 'deploy.pth'))
        models.append(load_deployed(deployed, weights))
    image = torch.randn(1, *image_shape(training, test_batch(cfg)))
    return least_seconds([partial(network_outputs, m, image) for m in models])


def summarize(args: argparse.Namespace) -> dict:
    """Collects the figures from the files that the tools have written."""
    switch, test, test_deploy, plain_switch, plain_test = (
        json.loads((args.work_dir / name).read_text()) for name in INPUTS
    )
    latencies, core_share = time_forms(args)
    train, deploy, plain = (1000 * seconds for seconds in latencies)
    return dict(
        train_top1=test[ACCURACY],
        deploy_top1=test_deploy[ACCURACY],
        plain_top1=plain_test[ACCURACY],
        max_abs_logit_diff=switch['differences']['test images']['absolute'],
        params_train=switch['training_form']['params'],
        params_deploy=switch['deployed']['params'],
        params_plain=plain_switch['deployed']['params'],
        latency_ms_train_form=train,
        latency_ms_deploy=deploy,
        latency_ms_plain=plain,
        core_share=core_share,
        training_seconds=args.training_seconds,
        plain_training_seconds=args.plain_training_seconds,
        seconds=args.seconds,
    )


def plot(runs: Sequence[Run], summary: dict, path: Path) -> None:
    """Draws loss and accuracy over the epochs, side by side."""
    figure, ((left, right),) = panels(1, 2, 9, 4)
    draw_losses(left, runs)
    draw_metric(right, runs, ACCURACY)
    deployed = summary['deploy_top1']
    label = f'OREPA, deployed: {deployed:.2f} %'
    right.axhline(deployed, color=SERIES[len(runs)], linestyle='--', label=label)
    right.set_ylabel('top-1 (%)')
    handles = right.get_legend_handles_labels()
    figure.legend(*handles, loc='outside lower center', ncols=3)
    figure.suptitle('ResNet-18 (slim) on handwritten digits')
    save(figure, path)


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    names = ('curves.png', 'branches.png', 'summary.json')
    curves, branches, target = (args.work_dir / name for name in names)
    check_outputs([curves, branches, target])
    summary = summarize(args)
    plain = read_run(args.work_dir / 'plain/train', 'plain')
    orepa = read_run(args.work_dir / 'train', 'OREPA, training form')
    plot([plain, orepa], summary, curves)
    if orepa.branches:  # Not where a config of one's own has no such hook.
        plot_branches(orepa, branches)
    write_json(summary, target)

    times = ('latency_ms_train_form', 'latency_ms_deploy', 'latency_ms_plain')
    rows = [
        ('top-1 accuracy (%)', '.2f', 'train_top1', 'deploy_top1', 'plain_top1'),
        ('parameters', ',d', 'params_train', 'params_deploy', 'params_plain'),
        ('latency (ms)', '.2f', *times),
    ]
    table = [
        (name, *(format(summary[key], spec) for key in keys))
        for name, spec, *keys in rows
    ]
    seconds = (str(args.training_seconds), '', str(args.plain_training_seconds))
    headers = ('', 'training form', 'deployed', 'plain twin')
    print(format_table(headers, [*table, ('training (s)', *seconds)]))
    if warning := busy_warning(summary['core_share']):
        print(warning)
    print(
        f'Largest difference of a logit: {summary["max_abs_logit_diff"]:.1e}. '
        f'Everything took {args.seconds} s.'
    )
    print(f'Figures: {target}   Curves: {curves}')
    if orepa.branches:
        print(f'What the branches did: {branches}')


if __name__ == '__main__':
    main()
