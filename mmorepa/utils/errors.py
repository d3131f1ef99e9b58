"""Errors that a user can fix."""

from collections.abc import Collection, Mapping
from typing import Optional

# An error about a state dict of a model that torch.compile has wrapped.
COMPILED_KEYS = (
    "its keys have '_orig_mod.', as those of a model that torch.compile wraps: save "
    'compiled._orig_mod.state_dict() instead, or take it out of the keys with '
    "key.replace('_orig_mod.', '')"
)


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or does not fit the model or the form that it is in."""


class DataError(RuntimeError):
    """A file of the data cannot be read."""


class OutputError(OSError):
    """A file cannot be written, or would take the place of another."""


def name_keys(what: str, keys: Collection[str], most: Optional[int] = 4) -> str:
    """A text for an error: '9 keys WHAT: a, b, c, d and 5 more', or '' without keys.

    ``most`` is the number of keys that are named; None names all.
    """
    if not keys:
        return ''
    keys = sorted(keys)
    unnamed = 0 if most is None else len(keys) - most
    more = f' and {unnamed} more' if unnamed > 0 else ''
    noun = 'key' if len(keys) == 1 else 'keys'
    return f'{len(keys)} {noun} {what}: {", ".join(keys[:most])}{more}'


def describe_misfit(
    expected: Mapping[str, tuple[int, ...]],
    actual: Mapping[str, tuple[int, ...]],
    most: Optional[int] = 4,
) -> str:
    """A text for an error: which entries of a state dict do not fit a model.

    Both map keys to shapes; ``most`` is as for :func:`name_keys`.
    """
    misshapen = [
        f'{key} {actual[key]}, not {shape}'
        for key, shape in expected.items()
        if actual.get(key, shape) != shape
    ]
    problems = (
        name_keys('missing', expected.keys() - actual.keys(), most),
        name_keys('left over', actual.keys() - expected.keys(), most),
        name_keys('of another shape', misshapen, most),
    )
    return '; '.join(filter(None, problems))
