"""One-line errors for command lines."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from urllib.error import URLError

from mmengine.registry import Registry
from mmengine.runner import BaseLoop

from ..utils.errors import CheckpointError, DataError, OutputError

_USER_ERRORS = (KeyError, OSError, ValueError, CheckpointError, DataError)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line for errors that the user can fix.

    Before the first batch, this holds for all errors. In a loop, it holds for errors of
    checkpoints, images and outputs, and all others show their traceback.
    ``MMOREPA_TRACEBACK=1`` shows every traceback.

    Examples:
        >>> @one_line_errors()
        ... def main(argv=None): ...
    """
    try:
        yield
    except Exception as error:
        is_ours = isinstance(error, (CheckpointError, DataError, OutputError))
        if os.environ.get('MMOREPA_TRACEBACK') or (not is_ours and _in_loop(error)):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        # An error of a dataloader's worker has the whole traceback as its text.
        if str(text).startswith('Caught ') and is_ours:
            text = str(text).strip().splitlines()[-1].partition(': ')[2]
        text = _explained(error) or ' '.join(str(text).split())
        # One word, such as a missing key, does not explain itself.
        if ' ' not in text or not isinstance(error, _USER_ERRORS):
            text = f'{type(error).__name__}: {text} (MMOREPA_TRACEBACK=1 shows where)'
        # MMEngine quotes whole configs and search paths.
        sys.exit(f'error: {text if is_ours or len(text) < 900 else text[:899] + "…"}')


def _explained(error: Exception) -> str:
    """A text for errors of libraries that need one, or ''; it reads their frames."""
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, URLError):
        known = next((f for f in frames if isinstance(f.get('url'), str)), {})
        place = next((f['dst'] for f in frames if isinstance(f.get('dst'), str)), None)
        setting = 'data_root of the dataset names its folder'
        if any('load_url' in str(f) or 'model_dir' in f for f in frames):
            setting = (
                'or name another file: model=dict(backbone=dict(init_cfg=dict('
                'checkpoint=...))), or load_from'
            )
        return (
            f'{known.get("url", "a file")!r} cannot be downloaded ({error.reason}); '
            f'get it by other means and put it at {place!r}; {setting}'
        )
    if isinstance(error, KeyError) and ' registry' in str(error):
        for known in reversed(frames):
            registry = known.get('registry') or known.get('self')
            name = known.get('layer_type') or known.get('obj_type')
            if isinstance(registry, Registry) and isinstance(name, str):
                names = [*registry.module_dict]
                while registry.parent is not None:
                    registry = registry.parent
                    names += registry.module_dict
                close = get_close_matches(name.rpartition('.')[2], names, n=1)
                advice = f'; did you mean {close[0]!r}?' if close else ''
                return f'type={name!r} is not in the {registry.name} registry{advice}'
    return ''


def _in_loop(error: Exception) -> bool:
    """Whether a loop of a runner raised the error."""
    return any(
        frame.f_code.co_name == 'run'
        and isinstance(frame.f_locals.get('self'), BaseLoop)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
