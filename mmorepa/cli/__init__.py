"""Arguments and error handling that all command lines share."""

from .arguments import load_config
from .errors import one_line_errors
from .parser import positive

__all__ = ['load_config', 'one_line_errors', 'positive']
