"""The tools that come with mmpretrain."""

import runpy
import sys
from pathlib import Path
from unittest import mock

# Their defaults ask for workers that persist.
NO_WORKERS = [
    f'{phase}_dataloader.persistent_workers=False' for phase in ('train', 'val', 'test')
]


def run(name, *args):
    """Runs ``tools/NAME`` of the installed mmpretrain in this process."""
    import mmpretrain

    path = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / name
    with mock.patch.object(sys, 'argv', [str(path), *map(str, args)]):
        runpy.run_path(str(path), run_name='__main__')
