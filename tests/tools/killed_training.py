"""One training through tools/train.py, to be killed.

Imported by a fork server before it forks: a training starts without its imports.
"""

import os
import random
import signal
import sys
import threading
import time

import mmpretrain.models  # noqa: F401
import torch
from tool_runs import run_here, tool

tool('train.py')


def train(config, work_dir, fatal=None, seed=0):
    """Trains, or goes on, in a process of its own.

    Args:
        config (Path): The config.
        work_dir (Path): Where the training is, if it has begun.
        fatal (int, optional): The number of the operation on a file of a checkpoint
            after which this process kills itself: while it writes, or renames, or
            removes, or soon after.
        seed (int): Of the moment.
    """
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(work_dir / 'output', os.O_WRONLY | os.O_APPEND), number)
    if fatal is not None:
        kill_self_after(fatal, str(work_dir), random.Random(seed).random() * 3e-3)
    run_here('train.py', config, '--work-dir', work_dir, '--resume')


def kill_self_after(fatal, folder, delay):
    """A kill while checkpoints are written, which one at any moment hits rarely."""
    count = 0

    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        nonlocal count
        if event not in ('open', 'os.rename', 'os.remove'):
            return
        name = str(arguments[0])
        is_checkpoint = name.endswith(('.pth', 'last_checkpoint'))
        if not name.startswith(folder) or not is_checkpoint:
            return
        if event == 'open' and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == fatal:
            threading.Thread(target=kill).start()

    sys.addaudithook(watch)
