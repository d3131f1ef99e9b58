"""Does it help to fine-tune a plain network with OREPA?

A slim ResNet-18 is pretrained and then fine-tuned, on each of two tasks:

- ``plain``: the plain network, plain.
- ``quiet``: the plain network as OREPA convs, by the quiet start.
- ``scratch``: a network of OREPA convs that was pretrained as such, for as long.

Seeds change initialisation and the order of the images, alike for all three, so that
differences are taken within a seed. A stopped run goes on where it was.
"""

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import pandas as pd
import studies
from mmengine.runner import load_checkpoint
from studies import charts
from trainings import epochs_options, last_checkpoint, merged, train

from mmorepa.cli import one_line_errors, positive
from mmorepa.converters import write_checkpoint
from mmorepa.layers import ReparamConv2d
from mmorepa.runs import build_model, check_data_folders

KEY = ('task', 'name', 'seed', 'epochs')
VALUES = ('value', 'seconds')
_BLOCK, _STEM = 'model.backbone.block', 'model.backbone.stem_block'
STEM_LR_MULT = 'optim_wrapper.paramwise_cfg.stem_lr_mult'
# What each network changes in the backbone.
NETWORKS = {
    'plain': {_BLOCK: 'plain'},
    'orepa': {_BLOCK: 'orepa'},
    'orepa_stem': {_BLOCK: 'plain', _STEM: 'orepa'},
    'plain_stem': {_BLOCK: 'orepa', _STEM: 'plain'},
}


class Arm(NamedTuple):
    """A pretraining, or a fine-tuning after it."""

    # Names in NETWORKS.
    pretrained: str
    fine_tuned: Optional[str] = None
    # From a plain kernel, a step moves that of the deep linear stem about 50 times as
    # far: see docs/transfer.md. None is what the config has.
    stem_lr_mult: Optional[float] = None
    # Whether a plain network starts with the folded kernels, and the norms as they are.
    is_folded: bool = False


ARMS = {
    'pretrained plain': Arm('plain'),
    'pretrained OREPA': Arm('orepa'),
    'pretrained OREPA stem': Arm('orepa_stem'),
    'pretrained OREPA, plain stem': Arm('plain_stem'),
    'plain': Arm('plain', 'plain', 1.0),
    'quiet': Arm('plain', 'orepa', 0.02),
    'quiet_stem': Arm('plain', 'orepa_stem', 0.02),
    'scratch': Arm('orepa', 'orepa'),
    'stem': Arm('orepa_stem', 'orepa_stem'),
    'plain_stem': Arm('plain_stem', 'plain_stem'),
    'folded': Arm('orepa', 'plain', 1.0, is_folded=True),
}
# Names and colours in tables and figures.
TEXTS = {
    **{
        name: (f'{name}, top-1 accuracy (%)', '')
        for name in ARMS
        if name.startswith('pretrained')
    },
    'plain': ('plain', charts.BLACK),
    'quiet': ('OREPA, quiet start', charts.BLUE),
    'quiet_stem': ('OREPA stem, quiet start', charts.SKY),
    # Of earlier versions, which had it.
    'balanced': ('OREPA, balanced start', charts.VERMILION),
    'scratch': ('OREPA, from scratch', charts.GREEN),
    'stem': ('OREPA stem, from scratch', charts.PURPLE),
    'plain_stem': ('OREPA with a plain stem, from scratch', charts.YELLOW),
    'folded': ('plain, from the folded OREPA', charts.ORANGE),
}
# What is compared with each of these.
COMPARED = {
    'plain': [name for name, (_, colour) in TEXTS.items() if colour][1:],
    'quiet': ['balanced', 'scratch'],
}


class Phase(NamedTuple):
    """A training of a config with some changes, and the metric of its validation."""

    config: Path
    metric: str
    # That of the metric: 1 for per cent.
    unit: float
    epochs: int
    options: dict


class Task(NamedTuple):
    """A pretraining of a classifier, and a fine-tuning."""

    text: str
    # The option that names the pretrained weights.
    start: str
    pretraining: Phase
    fine_tuning: Phase

    def epochs(self) -> str:
        """Those of both phases, as in the column of this name."""
        return f'{self.pretraining.epochs}+{self.fine_tuning.epochs}'


_FASHION = (
    studies.ROOT / 'configs/fashion_mnist/resnet18-slim_1xb64_fashion-mnist-10pct.py'
)
_DIGITS = studies.ROOT / 'configs/digits'
_TOP1 = 'accuracy/top1'
# A slim deep linear stem can be any plain kernel only for one channel of the image: for
# three, the chain of its factors would need more than 16 channels.
_GREY = {
    'model.backbone.in_channels': 1,
    'train_dataloader.dataset.pipeline.0': dict(color_type='grayscale'),
    'val_dataloader.dataset.pipeline.0': dict(color_type='grayscale'),
}
_GREY_PIXELS = dict(mean=[77.0], std=[95.0])
# The last tenth of the images; the pretraining has the first.
_OTHERS = {
    'train_dataloader.dataset.indices': -6000,
    'optim_wrapper.optimizer.lr': 0.01,
}
TASKS = {
    'classifier': Task(
        text='Fashion-MNIST, top-1 accuracy (%)',
        start='load_from',
        pretraining=Phase(_FASHION, _TOP1, 1, 8, {}),
        fine_tuning=Phase(_FASHION, _TOP1, 1, 8, _OTHERS),
    ),
    'detector': Task(
        text='scenes of digits, box AP (%)',
        start='model.backbone.init_cfg.checkpoint',
        pretraining=Phase(
            _DIGITS / 'resnet18-slim_1xb64_digits.py',
            _TOP1,
            1,
            8,
            {**_GREY, 'data_preprocessor': dict(_GREY_PIXELS, to_rgb=False)},
        ),
        fine_tuning=Phase(
            _DIGITS / 'faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py',
            'coco/bbox_mAP',
            100,
            5,
            {**_GREY, 'model.data_preprocessor': dict(_GREY_PIXELS, bgr_to_rgb=False)},
        ),
    ),
}


# Does a longer pretraining help a deep linear stem?
TASKS['detector-long'] = TASKS['detector']._replace(
    text='box AP (%), pretrained for 24 epochs',
    pretraining=TASKS['detector'].pretraining._replace(epochs=24),
)


def task_parser(description: str, name: str) -> argparse.ArgumentParser:
    """That of a study of these tasks."""
    parser = studies.study_parser(description, name)
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
    parser.add_argument(
        '--seeds', type=positive, default=5, help='how many of them (default: 5)'
    )
    return parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = task_parser(__doc__, 'plain_start')
    arms = 'pretrained plain', 'pretrained OREPA', 'plain', 'quiet', 'scratch'
    parser.add_argument(
        '--arms',
        nargs='+',
        choices=ARMS,
        default=arms,
        metavar='ARM',
        help=f'of {", ".join(ARMS)} (default: {", ".join(arms)})',
    )
    return parser.parse_args(argv)


def run_phase(
    phase: Phase,
    network: str,
    seed: str,
    folder: Path,
    stem_lr_mult: Optional[float] = None,
    **more: str,
) -> dict[str, str]:
    """Trains; a multiplier of None is what the config has. Gives :data:`VALUES`."""
    options = {
        **epochs_options(phase.epochs),
        **phase.options,
        **more,
        **NETWORKS[network],
        'randomness.seed': int(seed),
    }
    if stem_lr_mult is not None:
        options[STEM_LR_MULT] = stem_lr_mult
    training = train(phase.config, options, folder, phase.metric)
    return dict(
        value=f'{training.metric * phase.unit:.3f}', seconds=f'{training.seconds:.0f}'
    )


def fine_tune(task: Task, arm: Arm, seed: str, folder: Path) -> dict[str, str]:
    """Fine-tunes from a pretrained network, which is trained if it is not there."""
    start = folder.with_name(f'pretraining-{arm.pretrained}-{seed}')
    if last_checkpoint(start) is None:
        run_phase(task.pretraining, arm.pretrained, seed, start)
    weights = last_checkpoint(start)
    if arm.is_folded:
        weights = fold_weights(task.pretraining, arm.pretrained, weights)
    return run_phase(
        task.fine_tuning,
        arm.fine_tuned,
        seed,
        folder,
        arm.stem_lr_mult,
        **{task.start: str(weights)},
    )


def fold_weights(phase: Phase, network: str, weights: Path) -> Path:
    """Writes the weights of a plain network that computes what this one does."""
    model = build_model(merged(phase.config, {**phase.options, **NETWORKS[network]}))
    load_checkpoint(model, str(weights), map_location='cpu', strict=True)
    entries = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, ReparamConv2d):
            for key in module.branches.state_dict():
                del entries[f'{name}.branches.{key}']
            entries[f'{name}.branches.weight'] = module.folded_kernel().detach()
    path = weights.with_name('folded.pth')
    write_checkpoint(dict(state_dict=entries), path)
    return path


def measure(key: studies.Key, runs: Path) -> dict[str, str]:
    """Trains what a row stands for."""
    task, name, seed, epochs = key.values()
    folder, arm = runs / f'{task}-{epochs}', ARMS[name]
    if arm.fine_tuned is None:
        place = folder / f'pretraining-{arm.pretrained}-{seed}'
        return run_phase(TASKS[task].pretraining, arm.pretrained, seed, place)
    return fine_tune(TASKS[task], arm, seed, folder / f'{name}-{seed}')


def values_of(rows: pd.DataFrame, task: str) -> dict[str, pd.Series]:
    """By name and seed, for the schedule that the task has now."""
    is_ours = (rows.task == task) & (rows.epochs == TASKS[task].epochs())
    rows = rows[is_ours].set_index('seed')
    groups = dict(iter(rows.value.astype(float).groupby(rows.name)))
    return {name: groups[name] for name in TEXTS if name in groups}


def table(task: str, values: dict[str, pd.Series]) -> str:
    """What each network reaches, and differences within seeds."""
    rows = []
    for name, found in values.items():
        row = {TASKS[task].text: TEXTS[name][0]}
        row['mean ± deviation'] = studies.mean_and_deviation(found)
        for reference, names in COMPARED.items():
            if reference not in values:
                continue
            base = values[reference] if name in names else found[:0]
            row[f'minus {TEXTS[reference][0]}'] = studies.difference(found, base)
        rows.append({**row, 'seeds': str(len(found))})
    return studies.markdown_table(rows)


def report(rows: pd.DataFrame) -> studies.Report:
    """A table for each task, and the differences to plain of each arm."""
    found = {task: values_of(rows, task) for task in TASKS}
    found = {task: values for task, values in found.items() if values}
    figure, grid = charts.panels(1, len(found), 5.5 * len(found), 3)
    for axes, (task, values) in zip(grid[0], found.items()):
        lines = []
        for name in COMPARED['plain']:
            if name in values:
                each = studies.paired_differences(values[name], values['plain'])
                lines.append(studies.Line(*TEXTS[name], each))
        studies.draw_differences(axes, lines)
        axes.set(title=TASKS[task].text, xlabel='difference to plain, within a seed')
    figure.suptitle('Each seed, and the mean with its 95 % interval', fontsize='medium')
    tables = {task: table(task, values) for task, values in found.items()}
    return tables, dict(plain_start=figure)


def check_data(tasks: Iterable[str]) -> None:
    """Raises before hours of training, not after."""
    for name in tasks:
        for phase in (TASKS[name].pretraining, TASKS[name].fine_tuning):
            check_data_folders(merged(phase.config, phase.options), ('train', 'val'))


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)

    def make_keys() -> list[studies.Key]:
        check_data(args.tasks)
        # Seed by seed, so that a part of the study is one of fewer seeds.
        return [
            dict(task=task, name=arm, seed=str(seed), epochs=TASKS[task].epochs())
            for seed in range(args.seeds)
            for task in args.tasks
            for arm in args.arms
        ]

    results = studies.Results(args.out / 'results.csv', KEY, VALUES)
    run = partial(measure, runs=args.out / 'runs')
    studies.run_study(args, results, make_keys, run, report)


if __name__ == '__main__':
    main()
