"""Measures what waiting OpenMP threads cost, alone and beside busy processes.

Two threads that share a loop wait for each other at its end. GNU OpenMP waits in a
circle first, and puts a thread to sleep later; where the other thread has no core of
its own, the circles take the time that it needs. Each setting trains a slim
OREPA-ResNet-18 in a process of its own, in turn, alone and with a busy process for each
core beside it. Figures are milliseconds per step, the median and the slowest tenth.
"""

import argparse
import os
import subprocess
import sys
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
CORES = len(os.sched_getaffinity(0))
BUSY = (0, CORES)
ROUNDS, STEPS = 3, 30


def measure() -> list[float]:
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
    return [1e3 * clock.seconds(step) for _ in range(STEPS + 3)][3:]


def measure_beside(busy: int, setting: str) -> list[float]:
    """As :func:`measure`, in a process of its own beside so many busy ones."""
    known = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')
    env = {k: v for k, v in os.environ.items() if k not in known}
    env.update(SETTINGS[setting], OMP_NUM_THREADS=str(CORES))
    with ExitStack() as stack:
        for _ in range(busy):
            process = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
            stack.enter_context(process)
            stack.callback(process.kill)
        line = [sys.executable, __file__, '--measure']
        text = subprocess.check_output(line, env=env, text=True)
    return [*map(float, text.splitlines()[-1].split())]


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
    if parser.parse_args(argv).measure:
        print(*measure())
        return
    import pandas as pd

    times = {(setting, busy): [] for setting in SETTINGS for busy in BUSY}
    for _ in range(ROUNDS):
        for setting, busy in times:
            times[setting, busy] += measure_beside(busy, setting)
    frame = pd.DataFrame(times).quantile([0.5, 0.9]).round().astype(int).astype(str)
    cells = (frame.loc[0.5] + ' (' + frame.loc[0.9] + ')').unstack()
    cells = cells.rename(columns='{} busy'.format).loc[[*SETTINGS]]
    print(cells.rename_axis(columns=f'{CORES} threads').to_string())


if __name__ == '__main__':
    main()
