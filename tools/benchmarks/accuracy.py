"""Is a re-parameterised network better than the plain one, and by how much?

Slim networks are trained on Fashion-MNIST with each block, learning rate and seed, and
OREPA without each of its parts. A seed draws the same order and augmentation for all
blocks, so that differences to the plain network are taken within a seed. A stopped run
goes on where it was, and the rows of several machines can be merged.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Optional

# Before NumPy and PyTorch are loaded: there is a process for each core.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import accuracy_runs as runs
from accuracy_report import report
from studies import Key, Results, run_study, study_parser

from mmorepa.cli import one_line_errors, positive
from mmorepa.runs import check_data_folders


def seeds(text: str) -> list[int]:
    """``0-7`` or ``3``, as the type of an argument."""
    first, _, last = text.partition('-')
    return [*range(int(first), int(last or first) + 1)]


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    texts = [f'  {name}: {v.text}' for name, v in runs.VARIANTS.items() if v.text]
    parser = study_parser(
        __doc__,
        'accuracy',
        'trainings, on a GPU too,',
        epilog='\n'.join(['variants:', *texts]),
    )
    for name, choices, default, text in (
        ('data', runs.DATA, ['10pct', 'full'], 'data sets'),
        ('networks', runs.NETWORKS, ['resnet18', 'repvgg-a0'], 'networks'),
        ('blocks', runs.ALL_BLOCKS, runs.ALL_BLOCKS, 'where the network has them'),
        ('lr-factors', runs.FACTORS, runs.FACTORS, "learning rates over the recipe's"),
        (
            'variants',
            (*runs.VARIANTS, 'ablations'),
            [runs.STANDARD],
            'changes to the trainings, see below; ablations stands for '
            f'{runs.ABLATIONS[0]} and all after it',
        ),
    ):
        parser.add_argument(
            f'--{name}',
            nargs='+',
            choices=choices,
            default=[*default],
            metavar='NAME',
            help=f'{text}, of {", ".join(choices)} (default: {" ".join(default)})',
        )
    parser.add_argument(
        '--seeds', type=seeds, default=seeds('0-7'), help='like 0-7, the default'
    )
    parser.add_argument(
        '--epochs', type=positive, help='of each training (default: as in the config)'
    )
    parser.add_argument(
        '--merge',
        nargs='+',
        type=Path,
        default=[],
        metavar='CSV',
        help='take the rows of these files, too, such as those of other machines',
    )
    args = parser.parse_args(argv)
    if 'ablations' in args.variants:
        names = [*args.variants, *runs.ABLATIONS]
        args.variants = [name for name in runs.VARIANTS if name in names]
    return args


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    results = Results(args.out / 'results.csv', runs.KEY, runs.VALUES)

    def make_keys() -> list[Key]:
        keys = [*runs.keys_of(args)]
        if not keys:
            raise ValueError('these blocks, variants and seeds do not go together')
        runs.check_recipes(results, keys)
        if not {tuple(key.values()) for key in keys} <= results.keys():
            for data in args.data:
                config = runs.base_config(data, args.networks[0])
                check_data_folders(config, ('train', 'val'))
        return keys

    run_study(
        args,
        results,
        make_keys,
        partial(runs.measure, runs=args.out / 'runs'),
        partial(report, epochs=args.epochs),
        inputs=args.merge,
    )


if __name__ == '__main__':
    main()
