"""Measures what waiting OpenMP threads cost, alone and beside busy processes.

Two threads that share a loop wait for each other at its end. GNU OpenMP waits in a
circle first, and puts a thread to sleep later; where the other thread has no core of
its own, the circles take the time that it needs. Each setting trains a slim
OREPA-ResNet-18 in a process of its own, in turn, with as many busy processes beside it
as ``--busy`` says; figures are milliseconds per step, the median and the slowest tenth.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def _spin() -> None:
    while True:
        pass


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that keep cores busy."""
    processes = [multiprocessing.Process(target=_spin) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def main(argv: Optional[Sequence[str]] = None) -> dict:
    args = parse_args(argv)
    if args.measure:
        print(*measure(args.steps))
        return {}
    from mmorepa.utils.tables import format_table

    line = [sys.executable, __file__, '--measure', '--steps', str(args.steps)]
    base = {
        name: value
        for name, value in os.environ.items()
        if name not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')
    }
    base['OMP_NUM_THREADS'] = str(args.threads)
    times = {(setting, n): [] for setting in args.settings for n in args.busy}
    for _ in range(args.rounds):
        for setting, n in times:
            with busy(n):
                done = subprocess.run(
                    line,
                    env={**base, **SETTINGS[setting]},
                    check=True,
                    capture_output=True,
                    text=True,
                )
            words = done.stdout.splitlines()[-1].split()
            times[setting, n] += map(float, words)
    rows = []
    for setting in args.settings:
        row = [setting]
        for n in args.busy:
            found = sorted(times[setting, n])
            slow = found[int(0.9 * len(found))]
            row.append(f'{statistics.median(found):.0f} ({slow:.0f})')
        rows.append(row)
    headers = [f'{args.threads} threads', *(f'{n} busy' for n in args.busy)]
    print(format_table(headers, rows))
    return times


if __name__ == '__main__':
    main()
