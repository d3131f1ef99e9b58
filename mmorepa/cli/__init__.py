"""Arguments and error handling that all command lines share."""

from .arguments import load_config
from .errors import one_line_errors
from .parser import (
    Parser,
    add_common_arguments,
    add_config_options,
    add_shape,
    positive,
)

__all__ = [
    'Parser',
    'add_common_arguments',
    'add_config_options',
    'add_shape',
    'load_config',
    'one_line_errors',
    'positive',
]
