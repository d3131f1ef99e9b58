"""Errors that a user can mend."""

from collections.abc import Collection


class CheckpointError(RuntimeError):
    """A checkpoint does not fit the model, or the form that the model is in."""


def name_keys(what: str, keys: Collection[str], most: int = 4) -> str:
    """A text for an error: '3 keys …: a, b, c', or nothing if there are none.

    Args:
        what (str): What is the matter with them.
        keys (Collection[str]): The keys.
        most (int): How many are named. Defaults to 4.

    Returns:
        str: The text.
    """
    if not keys:
        return ''
    keys = sorted(keys)
    more = f' and {len(keys) - most} more' if len(keys) > most else ''
    noun = 'key' if len(keys) == 1 else 'keys'
    return f'{len(keys)} {noun} {what}: {", ".join(keys[:most])}{more}'
