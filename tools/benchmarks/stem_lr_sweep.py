"""How fast should the deep linear stem learn?

Two trainings are repeated with several multipliers of the stem's learning rate:

- ``classifier``: a slim OREPA-ResNet-18 on Fashion-MNIST, from initial weights
- ``detector``: a Faster R-CNN on scenes of digits, from a backbone that was trained as
  OREPA

Seeds change initialisation and the order of the images, alike for all multipliers, so
that differences are taken within a seed. A stopped run goes on where it was.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Optional

import pandas as pd
import studies
from plain_start import TASKS, VALUES, check_data, fine_tune, run_phase, task_parser
from studies import charts

from mmorepa.cli import one_line_errors

KEY = ('task', 'stem_lr_mult', 'seed', 'epochs')
MULTIPLIERS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
TEXTS = {
    'classifier': 'Fashion-MNIST from initial weights, top-1 accuracy (%)',
    'detector': 'Scenes of digits from an OREPA backbone, box AP (%)',
}
EPOCHS = {
    'classifier': str(TASKS['classifier'].pretraining.epochs),
    'detector': str(TASKS['detector'].fine_tuning.epochs),
}


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = task_parser(__doc__, 'stem_lr_sweep')
    parser.add_argument(
        '--multipliers', nargs='+', type=float, default=[*MULTIPLIERS], metavar='M'
    )
    return parser.parse_args(argv)


def measure(key: studies.Key, runs: Path) -> dict[str, str]:
    """Trains what a row stands for."""
    name, multiplier, seed, _ = key.values()
    task, folder = TASKS[name], runs / name / f'{multiplier}-{seed}'
    if name == 'classifier':
        return run_phase(task.pretraining, 'orepa', seed, folder, float(multiplier))
    return fine_tune(task, 'orepa', 'orepa', seed, folder, float(multiplier))


def report(rows: pd.DataFrame) -> studies.Report:
    """A table for each task, and each seed and their mean over the multipliers."""
    # Those of the schedule that the task has now.
    rows = rows[rows.epochs == rows.task.map(EPOCHS)].set_index('seed')
    rows = rows.astype(dict(value=float, stem_lr_mult=float))
    tasks = [task for task in TEXTS if task in {*rows.task}]
    figure, grid = charts.panels(1, len(tasks), 6 * len(tasks), 4)
    tables = {}
    for axes, task in zip(grid[0], tasks):
        own = rows[rows.task == task]
        groups = own.value.groupby(own.stem_lr_mult)
        tables[task] = table(TEXTS[task], dict(iter(groups)))
        axes.scatter(own.stem_lr_mult, own.value, s=16, color=charts.SKY)
        means = groups.mean()
        axes.plot(means, 'o-', color=charts.BLACK, label='mean of the seeds')
        axes.set(title=TEXTS[task], xlabel='stem_lr_mult', xscale='log')
        axes.set_xticks(means.index, [f'{multiplier:g}' for multiplier in means.index])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    return tables, dict(results=figure)


def table(text: str, values: dict[float, pd.Series]) -> str:
    """Means, and differences to a multiplier of one, if it is there."""
    rows = []
    for multiplier, found in values.items():
        base = values.get(1, found[:0]) if multiplier != 1 else found[:0]
        rows.append(
            {
                'stem_lr_mult': f'{multiplier:g}',
                text: studies.mean_and_deviation(found),
                'minus that of 1': studies.difference(found, base),
                'seeds': str(len(found)),
            }
        )
    return studies.markdown_table(rows)


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)

    def make_keys() -> list[studies.Key]:
        check_data(args.tasks)
        # Seed by seed, so that a part of the study is one of fewer seeds.
        return [
            dict(zip(KEY, (task, f'{multiplier:g}', str(seed), EPOCHS[task])))
            for seed in range(args.seeds)
            for task in args.tasks
            for multiplier in args.multipliers
        ]

    results = studies.Results(args.out / 'results.csv', KEY, VALUES)
    run = partial(measure, runs=args.out / 'runs')
    studies.run_study(args, results, make_keys, run, report)


if __name__ == '__main__':
    main()
