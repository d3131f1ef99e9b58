"""What happens to a process of a launched training, and what it writes.

Imported by configs of runs that the tests launch.
"""

import os
import signal
import sys
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

FOLDER = os.environ.get('MMOREPA_WRITES')


@HOOKS.register_module(force=True)
class Accident(Hook):
    """Kills one process.

    Args:
        rank (int): Which one.
        at (str): A point of the runner, such as ``'after_train_iter'``.
    """

    def __init__(self, rank, at):
        self.rank = rank
        setattr(self, at, self.happen)

    def happen(self, runner, *args, **kwargs):
        if get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def note_writes(folder):
    """Notes each file that this process opens to write or names otherwise."""
    path = Path(folder) / f'rank{os.environ["RANK"]}'
    notes = path.open('a', buffering=1)  # Until the process ends.

    def note(event, arguments):
        if event == 'open':
            path, mode, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ('os.rename', 'os.remove', 'os.link', 'os.symlink'):
            path = arguments[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)):
            notes.write(f'{os.path.abspath(path)}\n')

    sys.addaudithook(note)


if FOLDER and 'RANK' in os.environ:
    note_writes(FOLDER)
