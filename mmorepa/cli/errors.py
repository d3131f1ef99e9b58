"""One-line errors for command lines."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.runner import BaseLoop

from ..utils.errors import CheckpointError, OutputError

_USER_ERRORS = (KeyError, OSError, ValueError, CheckpointError)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line for errors that the user can fix.

    Before the first batch, these are all errors; in a loop, those of checkpoints and
    outputs. ``MMOREPA_TRACEBACK=1`` shows where they come from.

    Examples:
        >>> @one_line_errors()
        ... def main(argv=None): ...
    """
    try:
        yield
    except Exception as error:
        is_ours = isinstance(error, (CheckpointError, OutputError))
        if os.environ.get('MMOREPA_TRACEBACK') or (not is_ours and _in_loop(error)):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = ' '.join(str(text).split())
        # A bare key, for one, says nothing on its own.
        if ' ' not in text or not isinstance(error, _USER_ERRORS):
            text = f'{type(error).__name__}: {text} (MMOREPA_TRACEBACK=1 shows where)'
        # MMEngine quotes whole configs and search paths.
        sys.exit(f'error: {text if is_ours or len(text) < 900 else text[:899] + "…"}')


def _in_loop(error: Exception) -> bool:
    """Whether a runner's loop was under way."""
    return any(
        frame.f_code.co_name == 'run'
        and isinstance(frame.f_locals.get('self'), BaseLoop)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
