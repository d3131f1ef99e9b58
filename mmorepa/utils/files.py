"""Files that are either whole or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives the name to write to, which becomes ``path`` when all is written.

    Args:
        path (Path): The file to write, new or not. After an error it is as before.

    Yields:
        Path: A name beside it.

    Examples:
        >>> with atomic_write(Path('figures.json')) as file:
        ...     file.write_text('{}')
    """
    temporary = path.with_name(f'.{path.name}')
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
