"""Arguments and error handling that all command lines share."""

from .arguments import add_common_arguments, add_config_options, load_config, positive
from .errors import one_line_errors

__all__ = [
    'add_common_arguments',
    'add_config_options',
    'load_config',
    'one_line_errors',
    'positive',
]
