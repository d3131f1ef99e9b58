"""Atomic writes, checks that no file overwrites another, and the package's files."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union

from .errors import OutputError

PathLike = Union[str, Path]


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yields a temporary name to write to, and renames it to ``path`` at the end.

    The folder is made if need be, and a file that is replaced keeps its permissions. If
    the path is a symbolic link, the link stays and its target is written. After an
    error, the file is as before. Raises OutputError if it cannot be written, or as
    :func:`check_outputs`.

    Examples:
        >>> with atomic_write('figures.json') as file:
        ...     file.write_text('{}')
    """
    check_outputs([path])
    target = Path(os.path.realpath(path))
    # Other processes may be writing the same file.
    temporary = target.with_name(f'.{os.getpid()}.{target.name}')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f'{str(path)!r} cannot be written: {reason}') from error
    finally:
        # Not temporary.exists(), which raises an error if the name is too long.
        if os.path.lexists(temporary):
            temporary.unlink()


def write_json(content: object, path: Optional[PathLike]) -> None:
    """Writes a JSON file atomically; nothing for a path of None."""
    if path is not None:
        with atomic_write(path) as file:
            file.write_text(json.dumps(content, indent=2) + '\n')


def check_outputs(
    outputs: Iterable[Optional[PathLike]], inputs: Iterable[Optional[PathLike]] = ()
) -> None:
    """Checks that writing these files destroys nothing else; None is no file.

    Raises:
        OutputError: If an output is a folder or a device, is protected, or is an input
            or another output, also by way of links.
    """
    known = {_identity(path): path for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        name = str(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise OutputError(f'{name!r} is a folder or a device, not a file')
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise OutputError(f'{name!r} is protected from being written')
        identity = _identity(path)
        if identity in known:
            raise OutputError(
                f'{name!r} would take the place of {str(known[identity])!r}; write to '
                'another file'
            )
        known[identity] = path


def _identity(path: PathLike) -> object:
    """An identity that all names of a file share, whether it exists or not."""
    if os.path.exists(path):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return os.path.realpath(path)


def root() -> Path:
    """The folder of ``configs``, ``tools`` and ``model-index.yml``."""
    package = Path(__file__).resolve().parents[1]
    installed = package / '.mim'
    return installed if installed.is_dir() else package.parent
