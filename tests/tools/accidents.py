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
    """Ends one process.

    Args:
        rank (int): Which one.
        at (str): A point of the runner, such as ``'after_train_iter'``.
        how (str): ``'kill'``, ``'raise'`` or ``'leave'``: without an error.
        after (int): How many iterations before that pass unharmed.
    """

    def __init__(self, rank, at, how, after=0):
        self.rank, self.how, self.after = rank, how, after
        setattr(self, at, self.happen)

    def happen(self, runner, *args, **kwargs):
        if get_rank() != self.rank or runner.iter < self.after:
            return
        if self.how == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == 'leave':
            os._exit(0)
        raise RuntimeError('an accident')


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
