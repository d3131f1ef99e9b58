"""Shortens the log of a runner on the screen; the log file has everything."""

import logging
import re
import sys
import warnings

# Messages that start so are not shown: the environment, the whole config, the tables of
# hooks and parameter groups; advice of libraries to their developers; and weights of a
# classifier that a backbone does not use.
_LEFT_OUT = re.compile(
    r'\s*-{20,}|Config:|Hooks will be executed|Parameter groups|Exp name:'
    r'|Distributed training is not used|"FileClient" will|"HardDiskBackend" is'
    r'|Failed to search registry with scope'
    r'|The model and loaded state dict do not match exactly\s+'
    r'unexpected key in source state_dict: fc\.\w+(, fc\.\w+)*\s*$'
)
_STEPS = re.compile(r'(Epoch|Iter)\(train\)')


def shorten(logger: logging.Logger) -> None:
    """Hides messages that only the log file needs from the streams of a logger."""
    warnings.filterwarnings(
        'ignore', module=r'(mm(cv|det|engine|pretrain|seg)|torch)\b'
    )
    # On terminals, ProgressHook shows a moving line instead.
    left_out = [_LEFT_OUT, *([_STEPS] if sys.stdout.isatty() else [])]

    def is_shown(record: logging.LogRecord) -> bool:
        return not any(pattern.match(record.getMessage()) for pattern in left_out)

    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.addFilter(is_shown)
            handler.setFormatter(_Plain())


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = '' if record.levelno < logging.WARNING else f'{record.levelname}: '
        return f'{level}{super().format(record)}'
