"""Chooses the checkpoint that a training resumes from."""

import logging
import re
from pathlib import Path
from typing import Optional

from mmengine.logging import print_log

from ..converters import read_checkpoint
from ..utils.errors import CheckpointError

_NAME = re.compile(r'(epoch|iter)_\d+\.pth')


def read_resumable(path: str) -> dict:
    """Reads a checkpoint, which must hold the whole state of a training."""
    checkpoint = read_checkpoint(path)
    parts = ('message_hub', 'meta', 'optimizer')
    missing = [part for part in parts if not isinstance(checkpoint.get(part), dict)]
    if 'meta' not in missing and not {'epoch', 'iter'} <= checkpoint['meta'].keys():
        missing.append('meta')
    if missing:
        raise CheckpointError(
            f'{path!r} holds weights but not the state of a training run to resume '
            f'({", ".join(missing)} missing); start a new run by load_from=...'
        )
    return checkpoint


def newest_resumable(folder: str) -> tuple[Optional[str], Optional[dict]]:
    """Path and content of the last checkpoint of a training that can be read.

    It is the checkpoint that ``last_checkpoint`` in the work folder names. If that is
    damaged, it is the newest complete checkpoint in the folder, and a warning names the
    damaged ones. Both results are None if there is no checkpoint. If there are some and
    all are damaged, it raises CheckpointError.
    """
    skipped = ''
    for path in _candidates(Path(folder).resolve()):
        try:
            checkpoint = read_resumable(str(path))
        except (CheckpointError, FileNotFoundError) as error:
            skipped += f'\n  {error}'
            continue
        if skipped:
            _warn(
                f'Resuming from {str(path)!r}, since newer ones are unusable:{skipped}'
            )
        return str(path), checkpoint
    if skipped:
        raise CheckpointError(
            f'no checkpoint in {folder!r} can be resumed from; to start anew, choose '
            f'another --work-dir:{skipped}'
        )
    _warn(f'No checkpoint in {folder!r} to resume from: training starts anew.')
    return None, None


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints, in the order in which to try them."""
    paths = [path for path in folder.glob('*.pth') if _NAME.fullmatch(path.name)]
    paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    # The named checkpoint comes first, since copies have the time of their copying, and
    # an earlier training in this folder may have left files of later steps.
    pointer = folder / 'last_checkpoint'
    if pointer.is_file():
        # After a crash of the machine, the file may consist of zeros.
        text = pointer.read_text(errors='replace').strip('\0 \n')
        here = folder / Path(text).name  # The folder may have been moved, or copied.
        if text:
            paths.insert(0, here if here.exists() else Path(text))
    return list(dict.fromkeys(paths))


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)
