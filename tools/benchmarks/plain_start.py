"""Does it help to fine-tune a plain network with OREPA?

A slim ResNet-18 is pretrained and then fine-tuned in three ways, on each of two tasks:

- ``plain``: the plain network, plain.
- ``quiet``: the plain network as OREPA convs, by the quiet start.
- ``scratch``: a network of OREPA convs that was pretrained as such, for as long.

Seeds change initialisation and the order of the images, alike for all three, so that
differences are taken within a seed. A stopped run goes on where it was.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import pandas as pd
import studies
from trainings import Training, epochs_options, last_checkpoint, merged, train

from mmorepa.cli import one_line_errors, positive
from mmorepa.runs import check_data_folders

KEY = ('task', 'name', 'seed', 'epochs')
VALUES = ('value', 'seconds')
CLASSIFIER_METRIC = 'accuracy/top1'
STEM_LR_MULT = 'optim_wrapper.paramwise_cfg.stem_lr_mult'
# By block type.
PRETRAININGS = {'plain': 'pretrained plain', 'orepa': 'pretrained OREPA'}
# The block types of pretraining and fine-tuning, and the multiplier of the stem's
# learning rate, if it is not the config's. From a plain kernel, a step moves that of
# the deep linear stem about 50 times as far: see docs/transfer.md.
ARMS = {
    'plain': ('plain', 'plain', 1.0),
    'quiet': ('plain', 'orepa', 0.02),
    'scratch': ('orepa', 'orepa', None),
}
TEXTS = {
    **{name: f'{name}, top-1 accuracy (%)' for name in PRETRAININGS.values()},
    'plain': 'plain',
    'quiet': 'OREPA, quiet start',
    # Of earlier versions, which had it.
    'balanced': 'OREPA, balanced start',
    'scratch': 'OREPA, from scratch',
}
# Okabe and Ito's, as in tools/analysis_tools/charts.py.
COLOURS = dict(quiet='#0072B2', balanced='#D55E00', scratch='#009E73')
# What the others are compared with.
REFERENCES = ('plain', 'quiet')


class Task(NamedTuple):
    """A pretraining and a fine-tuning.

    Args:
        text (str): What is measured, for tables and figures.
        metric (str): What the fine-tuning's validation calls it.
        unit (float): Multiplies it.
        pretraining (Path): A classifier's config.
        fine_tuning (Path): The config.
        start (str): The option that names the pretrained weights: of all layers, or of
            the backbone alone.
        epochs (tuple[int, int]): Of both phases.
        options (tuple[dict, dict]): What to change in the configs.
    """

    text: str
    metric: str
    unit: float
    pretraining: Path
    fine_tuning: Path
    start: str
    epochs: tuple[int, int]
    options: tuple[dict, dict]


_FASHION = (
    studies.ROOT / 'configs/fashion_mnist/resnet18-slim_1xb64_fashion-mnist-10pct.py'
)
_DIGITS = studies.ROOT / 'configs/digits'
# A slim deep linear stem can be any plain kernel only for one channel of the image: for
# three, the chain of its factors would need more than 16 channels.
_GREY = {
    'model.backbone.in_channels': 1,
    'train_dataloader.dataset.pipeline.0': dict(color_type='grayscale'),
    'val_dataloader.dataset.pipeline.0': dict(color_type='grayscale'),
}
_GREY_PIXELS = dict(mean=[77.0], std=[95.0])
TASKS = {
    'classifier': Task(
        text='Fashion-MNIST, top-1 accuracy (%)',
        metric=CLASSIFIER_METRIC,
        unit=1.0,
        pretraining=_FASHION,
        fine_tuning=_FASHION,
        start='load_from',
        epochs=(8, 8),
        options=(
            {},
            {
                # The last tenth; the pretraining has the first.
                'train_dataloader.dataset.indices': -6000,
                'optim_wrapper.optimizer.lr': 0.01,
            },
        ),
    ),
    'detector': Task(
        text='scenes of digits, box AP (%)',
        metric='coco/bbox_mAP',
        unit=100.0,
        pretraining=_DIGITS / 'resnet18-slim_1xb64_digits.py',
        fine_tuning=_DIGITS / 'faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py',
        start='model.backbone.init_cfg.checkpoint',
        epochs=(8, 5),
        options=(
            {**_GREY, 'data_preprocessor': dict(_GREY_PIXELS, to_rgb=False)},
            {**_GREY, 'model.data_preprocessor': dict(_GREY_PIXELS, bgr_to_rgb=False)},
        ),
    ),
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = studies.study_parser(__doc__, 'plain_start')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
    parser.add_argument(
        '--seeds', type=positive, default=5, help='how many of them (default: 5)'
    )
    return parser.parse_args(argv)


def pretrain(
    task: Task, block: str, seed: int, folder: Path, stem_lr_mult: Optional[float]
) -> Training:
    """Trains the classifier of a task; a multiplier of None is what the config has."""
    options = {
        **epochs_options(task.epochs[0]),
        **task.options[0],
        **({} if stem_lr_mult is None else {STEM_LR_MULT: stem_lr_mult}),
        'model.backbone.block': block,
        'randomness.seed': seed,
    }
    return train(task.pretraining, options, folder, CLASSIFIER_METRIC)


def fine_tune(
    task: Task,
    blocks: tuple[str, str],
    seed: int,
    folder: Path,
    stem_lr_mult: Optional[float],
) -> Training:
    """Fine-tunes from a pretrained network, which is trained if it is not there."""
    start = folder.with_name(f'pretraining-{blocks[0]}-{seed}')
    if last_checkpoint(start) is None:
        pretrain(task, blocks[0], seed, start, None)
    options = {
        **epochs_options(task.epochs[1]),
        **task.options[1],
        **({} if stem_lr_mult is None else {STEM_LR_MULT: stem_lr_mult}),
        'model.backbone.block': blocks[1],
        task.start: str(last_checkpoint(start)),
        'randomness.seed': seed,
    }
    return train(task.fine_tuning, options, folder, task.metric)


def measured(unit: float, run: partial) -> dict[str, str]:
    """The values of a row, from a training."""
    training = run()
    return dict(
        value=f'{training.metric * unit:.3f}', seconds=f'{training.seconds:.0f}'
    )


def _epochs(task: str) -> str:
    return '+'.join(map(str, TASKS[task].epochs))


def jobs_of(name: str, seed: int, runs: Path) -> Iterator[studies.Job]:
    """Those of a task with one seed: two pretrainings, and the arms."""
    task, key = TASKS[name], dict(task=name, name='', seed=str(seed))
    key['epochs'] = _epochs(name)
    folder = runs / f'{name}-{key["epochs"]}'
    for block, text in PRETRAININGS.items():
        place = folder / f'pretraining-{block}-{seed}'
        run = partial(pretrain, task, block, seed, place, None)
        yield studies.Job({**key, 'name': text}, partial(measured, 1.0, run))
    for arm, (*blocks, stem_lr_mult) in ARMS.items():
        place = folder / f'{arm}-{seed}'
        run = partial(fine_tune, task, blocks, seed, place, stem_lr_mult)
        yield studies.Job({**key, 'name': arm}, partial(measured, task.unit, run))


def values_of(rows: pd.DataFrame, task: str) -> dict[str, pd.Series]:
    """By name and seed, for the schedule that the task has now."""
    rows = rows[(rows.task == task) & (rows.epochs == _epochs(task))].set_index('seed')
    groups = dict(iter(rows.value.astype(float).groupby(rows.name)))
    return {name: groups[name] for name in TEXTS if name in groups}


def table(task: str, values: dict[str, pd.Series]) -> str:
    """What each network reaches, and differences within seeds."""
    rows, arms = [], [name for name in values if name not in PRETRAININGS.values()]
    for name, found in values.items():
        row = {TASKS[task].text: TEXTS[name]}
        row['mean ± deviation'] = studies.mean_and_deviation(found)
        for reference in REFERENCES:
            text = ''
            # Each pair once.
            if reference in arms and name in arms[arms.index(reference) + 1 :]:
                text = str(studies.paired_difference(found, values[reference]) or '')
            row[f'minus {TEXTS[reference]}'] = text
        rows.append({**row, 'seeds': str(len(found))})
    return studies.markdown_table(rows)


def report(rows: pd.DataFrame) -> studies.Report:
    """A table for each task, and the differences to plain of each arm."""
    found = {task: values_of(rows, task) for task in TASKS}
    found = {task: values for task, values in found.items() if values}
    figure, grid = studies.panels(1, len(found), 5.5 * len(found), 3)
    for axes, (task, values) in zip(grid[0], found.items()):
        lines = [
            studies.Line(TEXTS[name], colour, values[name], values['plain'])
            for name, colour in COLOURS.items()
            if name in values
        ]
        studies.draw_differences(axes, lines)
        axes.set(title=TASKS[task].text, xlabel='difference to plain, within a seed')
    figure.suptitle('Each seed, and the mean with its 95 % interval', fontsize='medium')
    tables = {task: table(task, values) for task, values in found.items()}
    return tables, {'plain_start': (figure, 'The differences to plain, seed by seed')}


def check_data(tasks: Iterable[str]) -> None:
    """Raises before hours of training, not after."""
    for task in map(TASKS.get, tasks):
        for config, options in zip((task.pretraining, task.fine_tuning), task.options):
            check_data_folders(merged(config, options), ('train', 'val'))


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
            for job in jobs_of(task, seed, args.out / 'runs')
        ]

    results = studies.Results(args.out / 'results.csv', KEY, VALUES)
    studies.run_study(args, results, make_jobs, report, ['plain_start'])


if __name__ == '__main__':
    main()
