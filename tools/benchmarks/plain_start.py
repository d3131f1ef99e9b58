"""Does it help to fine-tune a plain network with OREPA?

A slim ResNet-18 is pretrained and then fine-tuned in three ways, on each of two tasks:

- ``plain``: the plain network, plain.
- ``quiet``: the plain network as OREPA convs, by the quiet start.
- ``scratch``: a network of OREPA convs that was pretrained as such, for as long.

Seeds change initialisation and the order of the images, alike for all three, so that
differences are taken within a seed. A stopped run goes on where it was.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import pandas as pd
import studies
import torch
from mmengine.runner import load_checkpoint
from trainings import Training, epochs_options, last_checkpoint, merged, train

from mmorepa.cli import one_line_errors, positive
from mmorepa.layers import ReparamConv2d
from mmorepa.runs import build_model, check_data_folders
from mmorepa.utils.files import atomic_write

KEY = ('task', 'name', 'seed', 'epochs')
VALUES = ('value', 'seconds')
STEM_LR_MULT = 'optim_wrapper.paramwise_cfg.stem_lr_mult'
_BLOCK, _STEM = 'model.backbone.block', 'model.backbone.stem_block'
_LR = 'optim_wrapper.optimizer.lr'
# What each network changes in the backbone.
NETWORKS = {
    'plain': {_BLOCK: 'plain'},
    'orepa': {_BLOCK: 'orepa'},
    'orepa_stem': {_BLOCK: 'plain', _STEM: 'orepa'},
    'plain_stem': {_BLOCK: 'orepa', _STEM: 'plain'},
}
PRETRAININGS = {
    'plain': 'pretrained plain',
    'orepa': 'pretrained OREPA',
    'orepa_stem': 'pretrained OREPA stem',
    'plain_stem': 'pretrained OREPA, plain stem',
}


class Arm(NamedTuple):
    """A way to a fine-tuned network."""

    # Names in NETWORKS.
    pretrained: str
    fine_tuned: str
    # What else the fine-tuning changes. From a plain kernel, a step moves that of the
    # deep linear stem about 50 times as far: see docs/transfer.md.
    options: dict
    # The plain kernels of the pretrained branches, with the norms as they are.
    is_folded: bool = False


ARMS = {
    'plain': Arm('plain', 'plain', {STEM_LR_MULT: 1.0}),
    'quiet': Arm('plain', 'orepa', {STEM_LR_MULT: 0.02}),
    'quiet_stem': Arm('plain', 'orepa_stem', {STEM_LR_MULT: 0.02}),
    'scratch': Arm('orepa', 'orepa', {}),
    'stem': Arm('orepa_stem', 'orepa_stem', {}),
    'plain_stem': Arm('plain_stem', 'plain_stem', {}),
    'folded': Arm('orepa', 'plain', {STEM_LR_MULT: 1.0}, is_folded=True),
    'plain_slow': Arm('plain', 'plain', {STEM_LR_MULT: 1.0, _LR: 0.02 / 3}),
    'scratch_slow': Arm('orepa', 'orepa', {_LR: 0.02 / 3}),
}
# Names and colours in tables and figures.
TEXTS = {
    'plain': ('plain', studies.BLACK),
    'quiet': ('OREPA, quiet start', studies.BLUE),
    # Of earlier versions, which had it.
    'balanced': ('OREPA, balanced start', studies.VERMILION),
    'quiet_stem': ('OREPA stem, quiet start', studies.SKY),
    'scratch': ('OREPA, from scratch', studies.GREEN),
    'stem': ('OREPA stem, from scratch', studies.PURPLE),
    'plain_stem': ('OREPA with a plain stem, from scratch', studies.YELLOW),
    'folded': ('plain, from the folded OREPA', studies.ORANGE),
    'plain_slow': ('plain, a third of the rate', studies.GREY),
    'scratch_slow': ('OREPA, from scratch, a third of the rate', studies.GREY),
}
# What is compared with each of these.
COMPARED = {
    'plain': tuple(name for name in TEXTS if name != 'plain'),
    'quiet': ('balanced', 'scratch'),
}


class Phase(NamedTuple):
    """A training of a config with some changes, and the metric of its validation."""

    config: Path
    metric: str
    epochs: int
    options: dict


class Task(NamedTuple):
    """A pretraining of a classifier, and a fine-tuning, whose metric is multiplied."""

    text: str
    unit: float
    # The option that names the pretrained weights.
    start: str
    pretraining: Phase
    fine_tuning: Phase
    # Names in ARMS.
    arms: tuple[str, ...]

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
        unit=1.0,
        start='load_from',
        pretraining=Phase(_FASHION, _TOP1, 8, {}),
        fine_tuning=Phase(_FASHION, _TOP1, 8, _OTHERS),
        arms=('plain', 'quiet', 'scratch'),
    ),
    'detector': Task(
        text='scenes of digits, box AP (%)',
        unit=100.0,
        start='model.backbone.init_cfg.checkpoint',
        pretraining=Phase(
            _DIGITS / 'resnet18-slim_1xb64_digits.py',
            _TOP1,
            8,
            {**_GREY, 'data_preprocessor': dict(_GREY_PIXELS, to_rgb=False)},
        ),
        fine_tuning=Phase(
            _DIGITS / 'faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py',
            'coco/bbox_mAP',
            5,
            {**_GREY, 'model.data_preprocessor': dict(_GREY_PIXELS, bgr_to_rgb=False)},
        ),
        arms=tuple(ARMS),
    ),
}

# Does a longer pretraining help a deep linear stem?
_LONG = TASKS['detector'].pretraining._replace(epochs=24)
TASKS['detector-long'] = TASKS['detector']._replace(
    text='scenes of digits, after 24 epochs of pretraining, box AP (%)',
    pretraining=_LONG,
)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = studies.study_parser(__doc__, 'plain_start')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
    parser.add_argument(
        '--seeds', type=positive, default=5, help='how many of them (default: 5)'
    )
    parser.add_argument('--arms', nargs='+', choices=ARMS, default=[*ARMS])
    return parser.parse_args(argv)


def run_phase(
    phase: Phase, network: str, seed: int, folder: Path, options: Mapping = {}
) -> Training:
    """Trains a network, with options that change its phase."""
    options = {
        **epochs_options(phase.epochs),
        **phase.options,
        **NETWORKS[network],
        **options,
        'randomness.seed': seed,
    }
    return train(phase.config, options, folder, phase.metric)


def fine_tune(task: Task, arm: Arm, seed: int, folder: Path) -> Training:
    """Fine-tunes from a pretrained network, which is trained if it is not there."""
    start = folder.with_name(f'pretraining-{arm.pretrained}-{seed}')
    if last_checkpoint(start) is None:
        run_phase(task.pretraining, arm.pretrained, seed, start)
    weights = last_checkpoint(start)
    if arm.is_folded:
        weights = fold_weights(task.pretraining, arm.pretrained, weights)
    options = {**arm.options, task.start: str(weights)}
    return run_phase(task.fine_tuning, arm.fine_tuned, seed, folder, options)


def fold_weights(phase: Phase, network: str, weights: Path) -> Path:
    """Writes the weights of a plain network that computes what this one does.

    Each conv has the folded kernel, and its norm stays.
    """
    options = {**phase.options, **NETWORKS[network]}
    model = build_model(merged(phase.config, options))
    load_checkpoint(model, str(weights), map_location='cpu', strict=True)
    entries = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, ReparamConv2d):
            kernel = module.weight.detach()
            for key in module.branches.state_dict():
                del entries[f'{name}.branches.{key}']
            entries[f'{name}.branches.weight'] = kernel
    path = weights.with_name('folded.pth')
    with atomic_write(path) as file:
        torch.save(dict(state_dict=entries), file)
    return path


def measured(unit: float, run: partial) -> dict[str, str]:
    """The values of a row, from a training."""
    training = run()
    return dict(
        value=f'{training.metric * unit:.3f}', seconds=f'{training.seconds:.0f}'
    )


def jobs_of(
    name: str, arms: Sequence[str], seed: int, runs: Path
) -> Iterator[studies.Job]:
    """Those of a task with one seed: pretrainings, and the arms."""
    task = TASKS[name]
    folder = runs / f'{name}-{task.epochs()}'
    works = {}
    arms = [arm for arm in task.arms if arm in arms]
    pretrained = {ARMS[arm].pretrained for arm in arms}
    for network in [n for n in PRETRAININGS if n in pretrained]:
        text = PRETRAININGS[network]
        place = folder / f'pretraining-{network}-{seed}'
        run = partial(run_phase, task.pretraining, network, seed, place)
        works[text] = partial(measured, 1.0, run)
    for arm in arms:
        run = partial(fine_tune, task, ARMS[arm], seed, folder / f'{arm}-{seed}')
        works[arm] = partial(measured, task.unit, run)
    for text, work in works.items():
        yield studies.Job(dict(zip(KEY, (name, text, str(seed), task.epochs()))), work)


def values_of(rows: pd.DataFrame, task: str) -> dict[str, pd.Series]:
    """By name and seed, for the schedule that the task has now."""
    is_ours = (rows.task == task) & (rows.epochs == TASKS[task].epochs())
    rows = rows[is_ours].set_index('seed')
    groups = dict(iter(rows.value.astype(float).groupby(rows.name)))
    names = (*PRETRAININGS.values(), *TEXTS)
    return {name: groups[name] for name in names if name in groups}


def table(task: str, values: dict[str, pd.Series]) -> str:
    """What each network reaches, and differences within seeds."""
    rows = []
    for name, found in values.items():
        text, _ = TEXTS.get(name, (f'{name}, top-1 accuracy (%)', None))
        row = {TASKS[task].text: text}
        row['mean ± deviation'] = studies.mean_and_deviation(found)
        for reference, names in COMPARED.items():
            base = values[reference] if name in names else found[:0]
            each = studies.paired_differences(found, base)
            row[f'minus {TEXTS[reference][0]}'] = studies.mean_and_interval(each)
        rows.append({**row, 'seeds': str(len(found))})
    return studies.markdown_table(rows)


def report(rows: pd.DataFrame) -> studies.Report:
    """A table for each task, and the differences to plain of each arm."""
    found = {task: values_of(rows, task) for task in TASKS}
    found = {task: values for task, values in found.items() if values}
    figure, grid = studies.panels(1, len(found), 5.5 * len(found), 3)
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
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)

    def make_jobs() -> list[studies.Job]:
        check_data(args.tasks)
        # Seed by seed, so that a part of the study is one of fewer seeds.
        return [
            job
            for seed in range(args.seeds)
            for task in args.tasks
            for job in jobs_of(task, args.arms, seed, args.out / 'runs')
        ]

    results = studies.Results(args.out / 'results.csv', KEY, VALUES)
    captions = dict(plain_start='The differences to plain, seed by seed')
    studies.run_study(args, results, make_jobs, report, captions)


if __name__ == '__main__':
    main()
