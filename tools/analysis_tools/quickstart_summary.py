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

import matplotlib.pyplot as plt
import torch
from charts import SERIES, save
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
FORMS = ('train_form', 'deploy', 'plain')
INPUTS = ('switch.json', 'test.json', 'test_deploy.json')
# Of the plain twin, in its folder.
INPUTS += ('plain/switch.json', 'plain/test.json')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Sums up what the quickstart did.')
    parser.add_argument('work_dir', type=Path, help='the folder of the quickstart')
    parser.add_argument('config', help='the config of the training form')
    parser.add_argument('checkpoint', help='the checkpoint of the training form')
    parser.add_argument('--seconds', type=int, required=True, help='of the whole run')
    parser.add_argument('--training-seconds', type=int, required=True)
    parser.add_argument('--plain-training-seconds', type=int, required=True)
    return parser.parse_args(argv)


def time_forms(
    work_dir: Path, config: str, checkpoint: str
) -> tuple[list[float], float]:
    """Times training form, deployed form and plain twin: see :func:`least_seconds`."""
    cfg = get_config(config)
    training = build_model(cfg)
    load_training_form(training, read_checkpoint(checkpoint)['state_dict'])
    models = [training]
    for folder in (work_dir, work_dir / 'plain'):
        deployed = get_config(str(folder / 'deploy_config.py'))
        weights = read_checkpoint(str(folder / 'deploy.pth'))
        models.append(load_deployed(deployed, weights))
    image = torch.randn(1, *image_shape(training, test_batch(cfg)))
    return least_seconds([partial(network_outputs, m, image) for m in models])


def summarize(args: argparse.Namespace) -> dict:
    """Collects the figures from the files that the tools have written."""
    work_dir = args.work_dir
    switch, test, test_deploy, plain_switch, plain_test = (
        json.loads((work_dir / name).read_text()) for name in INPUTS
    )
    before, after = switch['training_form'], switch['deployed']
    plain = plain_switch['deployed']
    seconds, core_share = time_forms(work_dir, args.config, args.checkpoint)
    return dict(
        train_top1=test[ACCURACY],
        deploy_top1=test_deploy[ACCURACY],
        plain_top1=plain_test[ACCURACY],
        max_abs_logit_diff=switch['differences']['test images']['absolute'],
        params_train=before['params'],
        params_deploy=after['params'],
        params_plain=plain['params'],
        **{f'latency_ms_{form}': 1000 * time for form, time in zip(FORMS, seconds)},
        core_share=core_share,
        training_seconds=args.training_seconds,
        plain_training_seconds=args.plain_training_seconds,
        seconds=args.seconds,
    )


def plot(runs: Sequence[Run], summary: dict, path: Path) -> None:
    """Draws loss and accuracy over the epochs, side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
    draw_losses(left, runs)
    draw_metric(right, runs, ACCURACY)
    right.axhline(
        summary['deploy_top1'],
        color=SERIES[len(runs)],
        linestyle='--',
        label=f'OREPA, deployed: {summary["deploy_top1"]:.2f} %',
    )
    right.set_ylabel('top-1 (%)')
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3)
    figure.suptitle('ResNet-18 (slim) on handwritten digits')
    save(figure, path)


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
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

    rows = [
        ('top-1 accuracy (%)', '.2f', 'train_top1', 'deploy_top1', 'plain_top1'),
        ('parameters', ',d', 'params_train', 'params_deploy', 'params_plain'),
        ('latency (ms)', '.2f', *(f'latency_ms_{form}' for form in FORMS)),
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
