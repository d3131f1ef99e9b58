"""Measures what waiting OpenMP threads cost, alone and beside busy processes.

Two threads that share a loop wait for each other at its end. GNU OpenMP waits in a
circle first, and puts a thread to sleep later; where the other thread has no core of
its own, the circles take the time that it needs. Each setting trains a slim
OREPA-ResNet-18 in a process of its own, in turn, with as many busy processes beside it
as ``--busy`` says; figures are milliseconds per step, the median and the slowest tenth.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Optional

SETTINGS = {
    'default': {},
    'PASSIVE': {'OMP_WAIT_POLICY': 'PASSIVE'},
    '1,000 turns': {'GOMP_SPINCOUNT': '1000'},
    '10,000 turns': {'GOMP_SPINCOUNT': '10000'},
    '100,000 turns': {'GOMP_SPINCOUNT': '100000'},
    'ACTIVE': {'OMP_WAIT_POLICY': 'ACTIVE'},
}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures what OpenMP's way of waiting costs."
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        '--busy',
        type=int,
        nargs='+',
        default=[0, cores],
        help='numbers of busy processes beside; none, and one per core by default',
    )
    parser.add_argument('--threads', type=int, default=cores)
    parser.add_argument('--steps', type=int, default=30, help='per round')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument(
        '--settings', nargs='+', choices=SETTINGS, default=list(SETTINGS)
    )
    parser.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(steps: int) -> list[float]:
    """Milliseconds of each training step in this process."""
    import torch
    from mmengine.optim import build_optim_wrapper

    from mmorepa.analysis.timing import Clock
    from mmorepa.backbones import OREPAResNet

    model = OREPAResNet(depth=18, base_channels=16)
    config = dict(
        constructor='OREPAOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=1e-3, momentum=0.9),
    )
    wrapper = build_optim_wrapper(model, config)
    images = torch.randn(16, 3, 64, 64)

    def step() -> None:
        with wrapper.optim_context(model):
            loss = model(images)[-1].square().mean()
        wrapper.update_params(loss)

    clock = Clock()
    return [1e3 * clock.seconds(step) for _ in range(steps + 3)][3:]


def measure_beside(busy: int, args: argparse.Namespace, setting: str) -> list[float]:
    """As :func:`measure`, in a process of its own beside so many busy ones."""
    known = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')
    env = {k: v for k, v in os.environ.items() if k not in known}
    env.update(SETTINGS[setting], OMP_NUM_THREADS=str(args.threads))
    line = [sys.executable, __file__, '--measure', '--steps', str(args.steps)]
    with ExitStack() as stack:
        for _ in range(busy):
            process = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
            stack.enter_context(process)
            stack.callback(process.kill)
        text = subprocess.check_output(line, env=env, text=True)
    return [*map(float, text.splitlines()[-1].split())]


def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    if args.measure:
        print(*measure(args.steps))
        return {}
    import pandas as pd

    times = {(setting, n): [] for setting in args.settings for n in args.busy}
    for _ in range(args.rounds):
        for setting, n in times:
            times[setting, n] += measure_beside(n, args, setting)
    frame = pd.DataFrame(times).quantile([0.5, 0.9]).round().astype(int)
    cells = (
        frame.loc[0.5].astype(str) + ' (' + frame.loc[0.9].astype(str) + ')'
    ).unstack()
    cells = cells.rename(columns='{} busy'.format).loc[args.settings]
    print(cells.rename_axis(columns=f'{args.threads} threads').to_string())
    return times


if __name__ == '__main__':
    main()
