"""Does it help to fine-tune a plain network with OREPA, and from which start?

A slim ResNet-18 is pretrained and then fine-tuned in four ways, on each of two tasks:

- ``plain``: the plain network, plain.
- ``quiet``: the plain network as OREPA convs.
- ``scratch``: a network of OREPA convs that was pretrained as such, for as long.

Seeds change initialisation and the order of the images, alike for all four, so that
differences are taken within a seed. A stopped run goes on where it was.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from studies import (
    ROOT,
    Job,
    Results,
    Training,
    add_study_arguments,
    epochs_options,
    last_checkpoint,
    merged,
    raise_failures,
    run_jobs,
    train,
)
from study_reports import (
    markdown_table,
    mean_and_deviation,
    paired_difference,
    write_report,
)

from mmorepa.cli import one_line_errors
from mmorepa.engine.config import check_data_folders
from mmorepa.utils.files import atomic_write, check_outputs

KEY = ('task', 'name', 'seed', 'epochs')
VALUES = ('value', 'seconds')
CLASSIFIER_METRIC = 'accuracy/top1'
# From a plain kernel, a step moves that of the deep linear stem about 50 times as far:
# see docs/transfer.md.
STEM_LR_MULT = 0.02


class Arm(NamedTuple):
    """One way to fine-tune.

    Args:
        text (str): What it is called in tables.
        pretrained (str): The block type of the pretraining.
        block (str): That of the fine-tuning.
        stem_lr_mult (float, optional): None is what the config has.
    """

    text: str
    pretrained: str
    block: str
    stem_lr_mult: Optional[float] = None

    def options(self) -> dict:
        """What it changes in a config."""
        options = {'model.backbone.block': self.block}
        if self.stem_lr_mult is not None:
            options['optim_wrapper.paramwise_cfg.stem_lr_mult'] = self.stem_lr_mult
        return options


ARMS = {
    'plain': Arm('plain', 'plain', 'plain', stem_lr_mult=1.0),
    'quiet': Arm('OREPA, quiet start', 'plain', 'orepa', STEM_LR_MULT),
    # Another way to split kernels, which is gone: its results are reported.
    'balanced': Arm('OREPA, balanced start', 'plain', 'orepa', STEM_LR_MULT),
    'scratch': Arm('OREPA, from scratch', 'orepa', 'orepa'),
}
# By block type.
PRETRAININGS = {'plain': 'pretrained plain', 'orepa': 'pretrained OREPA'}
TEXTS = {
    **{name: f'{name}, top-1 accuracy (%)' for name in PRETRAININGS.values()},
    **{name: arm.text for name, arm in ARMS.items()},
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
        takes_head (bool): Whether the fine-tuning starts from all weights, and not from
            those of the backbone alone.
        epochs (tuple[int, int]): Of both phases.
        options (tuple[dict, dict]): What to change in the configs.
    """

    text: str
    metric: str
    unit: float
    pretraining: Path
    fine_tuning: Path
    takes_head: bool
    epochs: tuple[int, int]
    options: tuple[dict, dict]


_FASHION = ROOT / 'configs/fashion_mnist/resnet18-slim_1xb64_fashion-mnist-10pct.py'
_DIGITS = ROOT / 'configs/digits'
# A slim deep linear stem can be any plain kernel only for one channel of the image: for
# three, the chain of its factors would need more than 16 channels.
_GREY = dict(color_type='grayscale')
_GREY_NETWORK = {
    'model.backbone.in_channels': 1,
    'train_dataloader.dataset.pipeline.0': _GREY,
    'val_dataloader.dataset.pipeline.0': _GREY,
}
_GREY_PIXELS = dict(mean=[77.0], std=[95.0])
TASKS = {
    'classifier': Task(
        text='Fashion-MNIST, top-1 accuracy (%)',
        metric=CLASSIFIER_METRIC,
        unit=1.0,
        pretraining=_FASHION,
        fine_tuning=_FASHION,
        takes_head=True,
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
        takes_head=False,
        epochs=(8, 5),
        options=(
            {
                **_GREY_NETWORK,
                'data_preprocessor': dict(_GREY_PIXELS, to_rgb=False),
            },
            {
                **_GREY_NETWORK,
                'model.data_preprocessor': dict(_GREY_PIXELS, bgr_to_rgb=False),
            },
        ),
    ),
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Measures whether a start from a plain network helps, and which '
        'one. A stopped run goes on where it was.'
    )
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
    add_study_arguments(parser, 'plain_start')
    return parser.parse_args(argv)


def checkpoint_of(task: str, block: str, seed: int, runs: Path) -> Path:
    """The network that the fine-tuning starts from; trained if it is not there."""
    work_dir = _work_dir(task, f'pretraining-{block}', seed, runs)
    return last_checkpoint(work_dir) or pretrain(task, block, seed, runs).checkpoint


def pretrain(task: str, block: str, seed: int, runs: Path) -> Training:
    options = {
        **epochs_options(TASKS[task].epochs[0]),
        **TASKS[task].options[0],
        'model.backbone.block': block,
        'randomness.seed': seed,
    }
    work_dir = _work_dir(task, f'pretraining-{block}', seed, runs)
    return train(TASKS[task].pretraining, options, work_dir, CLASSIFIER_METRIC)


def fine_tune(task: str, name: str, seed: int, runs: Path) -> Training:
    arm, takes_head = ARMS[name], TASKS[task].takes_head
    start = 'load_from' if takes_head else 'model.backbone.init_cfg.checkpoint'
    options = {
        **epochs_options(TASKS[task].epochs[1]),
        **TASKS[task].options[1],
        **arm.options(),
        start: str(checkpoint_of(task, arm.pretrained, seed, runs)),
        'randomness.seed': seed,
    }
    work_dir = _work_dir(task, name, seed, runs)
    return train(TASKS[task].fine_tuning, options, work_dir, TASKS[task].metric)


def _work_dir(task: str, name: str, seed: int, runs: Path) -> Path:
    return runs / f'{task}-{_epochs(task)}' / f'{name}-{seed}'


def _epochs(task: str) -> str:
    return '+'.join(map(str, TASKS[task].epochs))


def jobs_of(task: str, seed: int, runs: Path) -> Iterator[Job]:
    """Those of a task with one seed: two pretrainings, and the arms."""

    def job(name: str, unit: float, run: Callable[[], Training]) -> Job:
        def values() -> dict[str, str]:
            training = run()
            return dict(
                value=f'{training.metric * unit:.3f}',
                seconds=f'{training.seconds:.0f}',
            )

        key = dict(task=task, name=name, seed=str(seed), epochs=_epochs(task))
        return Job(key, values)

    for block, name in PRETRAININGS.items():
        yield job(name, 1.0, partial(pretrain, task, block, seed, runs))
    for name in (name for name in ARMS if name != 'balanced'):
        yield job(name, TASKS[task].unit, partial(fine_tune, task, name, seed, runs))


def values_of(results: Results, task: str, name: str) -> dict[str, float]:
    """By seed, for the schedule that the task has now."""
    return {
        row['seed']: float(row['value'])
        for row in results.rows
        if (row['task'], row['name'], row['epochs']) == (task, name, _epochs(task))
    }


def to_markdown(results: Results) -> str:
    """A table for each task: what each network reaches, and differences of seeds."""
    tables = []
    arms = [*ARMS]
    for task, spec in TASKS.items():
        rows = []
        for name, text in TEXTS.items():
            values = values_of(results, task, name)
            if not values:
                continue
            cells = []
            for reference in REFERENCES:
                difference = paired_difference(
                    values, values_of(results, task, reference)
                )
                # Each pair once.
                is_later = name in arms[arms.index(reference) + 1 :]
                cells.append(str(difference) if difference and is_later else '')
            mean = mean_and_deviation([*values.values()])
            rows.append((text, mean, *cells, str(len(values))))
        differences = [f'minus {TEXTS[reference]}' for reference in REFERENCES]
        headers = (spec.text, 'mean ± deviation', *differences, 'seeds')
        tables.append(markdown_table(headers, rows))
    return '\n\n'.join(tables)


def plot(results: Results, path: Path) -> None:
    """Draws the difference to plain of each arm: seeds, mean and interval."""
    figure, panels = plt.subplots(
        1,
        len(TASKS),
        figsize=(4.6 * len(TASKS), 3.6),
        layout='constrained',
        squeeze=False,
    )
    for axes, (task, spec) in zip(panels[0], TASKS.items()):
        plain = values_of(results, task, 'plain')
        for x, (name, colour) in enumerate(COLOURS.items()):
            values = values_of(results, task, name)
            seeds = [seed for seed in values if seed in plain]
            axes.scatter(
                [x - 0.12] * len(seeds),
                [values[seed] - plain[seed] for seed in seeds],
                s=14,
                alpha=0.6,
                color=colour,
            )
            found = paired_difference(values, plain)
            if found and found.pairs > 1:
                reach = found.high - found.mean
                axes.errorbar(
                    x + 0.12, found.mean, reach, fmt='o', capsize=4, color=colour
                )
        axes.axhline(0, color='black', linewidth=0.8)
        axes.set_xticks(
            range(len(COLOURS)), [TEXTS[n].replace(', ', '\n') for n in COLOURS]
        )
        axes.set_xlim(-0.5, len(COLOURS) - 0.5)
        axes.set(title=spec.text, ylabel='difference to plain, within a seed')
        axes.grid(alpha=0.3, axis='y')
    figure.suptitle('Each seed, and the mean with its 95 % interval', fontsize='medium')
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


def check_data(task: Task) -> None:
    """Raises before hours of training, not after."""
    for config, options in zip((task.pretraining, task.fine_tuning), task.options):
        check_data_folders(merged(config, options), ('train', 'val'))


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    check_outputs(args.out / f'results.{suffix}' for suffix in ('csv', 'md', 'png'))
    results = Results(args.out / 'results.csv', KEY, VALUES)
    if not args.report_only:
        for task in args.tasks:
            check_data(TASKS[task])
        # Seed by seed, so that a part of the study is one of fewer seeds.
        jobs = [
            job
            for seed in range(args.seeds)
            for task in args.tasks
            for job in jobs_of(task, seed, args.out / 'runs')
        ]
        raise_failures(run_jobs(jobs, results))
    write_report(results, to_markdown, plot)


if __name__ == '__main__':
    main()
