"""Does a multiplier of the stem's learning rate help?

Two trainings are repeated with several multipliers of the stem's learning rate:

- ``classifier``: a slim OREPA-ResNet-18 on Fashion-MNIST, from initial weights
- ``detector``: a Faster R-CNN on scenes of digits, from a backbone that was trained as
  OREPA

Seeds change initialisation and the order of the images, alike for all multipliers, so
that differences are taken within a seed. A stopped run goes on where it was.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from plain_start import CLASSIFIER_METRIC, TASKS, check_data, checkpoint_of
from studies import (
    Job,
    Results,
    Training,
    add_study_arguments,
    epochs_options,
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
from mmorepa.utils.files import atomic_write, check_outputs

KEY = ('task', 'stem_lr_mult', 'seed', 'epochs')
VALUES = ('value', 'seconds')
MULTIPLIERS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
# What the others are compared with.
REFERENCE = 1.0
OPTION = 'optim_wrapper.paramwise_cfg.stem_lr_mult'
TEXTS = {
    'classifier': 'Fashion-MNIST from initial weights, top-1 accuracy (%)',
    'detector': 'Scenes of digits from an OREPA backbone, box AP (%)',
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--tasks', nargs='+', choices=TEXTS, default=[*TEXTS])
    parser.add_argument(
        '--multipliers', nargs='+', type=float, default=[*MULTIPLIERS], metavar='M'
    )
    add_study_arguments(parser, 'stem_lr_sweep')
    args = parser.parse_args(argv)
    if min(args.multipliers) < 0:
        parser.error(f'--multipliers are at least 0, found {min(args.multipliers)}')
    return args


def classify(multiplier: float, seed: int, runs: Path) -> Training:
    """Trains the classifier from its initial weights."""
    spec = TASKS['classifier']
    options = {
        **epochs_options(_epochs('classifier')),
        **spec.options[0],
        'model.backbone.block': 'orepa',
        OPTION: multiplier,
        'randomness.seed': seed,
    }
    work_dir = runs / f'classifier-{multiplier:g}-{seed}'
    return train(spec.pretraining, options, work_dir, CLASSIFIER_METRIC)


def detect(multiplier: float, seed: int, runs: Path) -> Training:
    """Fine-tunes the detector; its backbone is trained if it is not there."""
    spec = TASKS['detector']
    backbone = checkpoint_of('detector', 'orepa', seed, runs)
    options = {
        **epochs_options(_epochs('detector')),
        **spec.options[1],
        'model.backbone.init_cfg.checkpoint': str(backbone),
        OPTION: multiplier,
        'randomness.seed': seed,
    }
    work_dir = runs / f'detector-{multiplier:g}-{seed}'
    return train(spec.fine_tuning, options, work_dir, spec.metric)


TRAININGS: dict[str, Callable[[float, int, Path], Training]] = dict(
    classifier=classify, detector=detect
)


def _epochs(task: str) -> int:
    # The classifier's pretraining; the detector's fine-tuning.
    return TASKS[task].epochs[0 if task == 'classifier' else 1]


def job_of(task: str, multiplier: float, seed: int, runs: Path) -> Job:
    """One training."""

    def values(run: Callable[[], Training]) -> dict[str, str]:
        training = run()
        return dict(
            value=f'{training.metric * TASKS[task].unit:.3f}',
            seconds=f'{training.seconds:.0f}',
        )

    numbers = (f'{multiplier:g}', str(seed), str(_epochs(task)))
    run = partial(TRAININGS[task], multiplier, seed, runs)
    return Job(dict(zip(KEY, (task, *numbers))), partial(values, run))


def values_of(results: Results, task: str) -> dict[float, dict[str, float]]:
    """By multiplier and seed, for the schedule that the task has now."""
    found: dict[float, dict[str, float]] = {}
    for row in results.rows:
        if (row['task'], row['epochs']) == (task, str(_epochs(task))):
            by_seed = found.setdefault(float(row['stem_lr_mult']), {})
            by_seed[row['seed']] = float(row['value'])
    return dict(sorted(found.items()))


def to_markdown(results: Results) -> str:
    """A table for each task."""
    tables = []
    for task, text in TEXTS.items():
        values = values_of(results, task)
        rows = []
        for multiplier, by_seed in values.items():
            difference = None
            if multiplier != REFERENCE:
                difference = paired_difference(by_seed, values.get(REFERENCE, {}))
            rows.append(
                (
                    f'{multiplier:g}',
                    mean_and_deviation([*by_seed.values()]),
                    str(difference or ''),
                    str(len(by_seed)),
                )
            )
        if rows:
            minus = f'minus that of {REFERENCE:g}'
            headers = ('stem_lr_mult', text, minus, 'seeds')
            tables.append(markdown_table(headers, rows))
    return '\n\n'.join(tables)


def plot(results: Results, path: Path) -> None:
    """Each seed, and their mean, over the multipliers."""
    tasks = [task for task in TEXTS if values_of(results, task)]
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(6 * len(tasks), 4), layout='constrained', squeeze=False
    )
    for axes, task in zip(panels[0], tasks):
        values = values_of(results, task)
        for multiplier, by_seed in values.items():
            axes.scatter(
                [multiplier] * len(by_seed), by_seed.values(), s=16, color='#56B4E9'
            )
        means = [sum(v.values()) / len(v) for v in values.values()]
        axes.plot([*values], means, 'o-', color='#000000', label='mean of the seeds')
        axes.set(title=TEXTS[task], xlabel='stem_lr_mult', xscale='log')
        axes.set_xticks([*values], [f'{multiplier:g}' for multiplier in values])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


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
            job_of(task, multiplier, seed, args.out / 'runs')
            for seed in range(args.seeds)
            for task in args.tasks
            for multiplier in args.multipliers
        ]
        raise_failures(run_jobs(jobs, results))
    write_report(results, to_markdown, plot)


if __name__ == '__main__':
    main()
