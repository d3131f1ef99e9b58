"""Chooses the checkpoint that a training resumes from."""

import logging
import re
from pathlib import Path
from typing import Optional

from mmengine.logging import print_log

from ..converters import read_checkpoint
from ..utils.errors import CheckpointError

_STEP = re.compile(r'_(\d+)\.pth$')


def read_resumable(path: str) -> dict:
    """As :func:`read_checkpoint`, and it must hold the whole state of a training."""
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

    It is the one that ``last_checkpoint`` in the work folder names, unless that is
    damaged, or one of a later step was written since: a kill may come between the two
    files. A warning names those that are left out. Without any checkpoint both are
    None; if none can be resumed from, it raises CheckpointError.
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
    named = _named(folder)
    paths = {
        path
        for place in {folder, named.parent if named else folder}
        for path in place.glob('*.pth')
        if _STEP.search(path.name) and not path.name.startswith(('best_', '.'))
    }
    paths = sorted(paths, key=_age, reverse=True)
    if named is None:
        return paths
    # Neither time nor step alone tells: files of an earlier training in this folder may
    # be of later steps, and copies are as old as their copying.
    time, step = _age(named)
    later = [p for p in paths if _age(p)[0] >= time and _age(p)[1] > step]
    return [*dict.fromkeys([*later, named, *paths])]


def _named(folder: Path) -> Optional[Path]:
    """The checkpoint that ``last_checkpoint`` names."""
    pointer = folder / 'last_checkpoint'
    if not pointer.is_file():
        return None
    # A crash of the machine may leave zeros.
    text = pointer.read_text(errors='replace').strip('\0 \n')
    named = Path(text).resolve() if text else None
    if named and (folder / named.name).exists():
        return folder / named.name  # The folder may have been moved, or copied.
    return named


def _age(path: Path) -> tuple[int, int]:
    """The time and the step of a checkpoint."""
    step = _STEP.search(path.name)
    time = path.stat().st_mtime_ns if path.exists() else 0
    return time, int(step[1]) if step else -1


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)
