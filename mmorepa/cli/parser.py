"""Parsers of command lines, which ``tools/start.py`` reads without PyTorch."""

import argparse
import os
import sys
from typing import Any, Optional


class Parser(argparse.ArgumentParser):
    """A parser that names its command and shows an example.

    Args:
        description (str): Describes the command; line breaks are kept.
        example (str): The arguments of a call.
    """

    # Set by ``python -m mmorepa COMMAND``. Child processes are other commands.
    command = os.environ.pop('MMOREPA_COMMAND', None)

    def __init__(self, description: Optional[str], example: str) -> None:
        name = f'-m mmorepa {self.command}' if self.command else sys.argv[0]
        super().__init__(
            prog=f'python {name}',
            description=description,
            epilog=f'example:\n  python {name} {example}'.rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


class _Settings(argparse.Action):
    """MMEngine's ``DictAction``, with a parser error for values that it cannot read."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: Any = None
    ) -> None:
        # Not at the top: help needs no MMEngine.
        from mmengine.config import DictAction

        try:
            DictAction(self.option_strings, self.dest)(parser, namespace, values)
        except Exception as error:
            parser.error(f'{option_string} takes KEY=VALUE, found {values} ({error})')


class _Shape(argparse.Action):
    """One number for both height and width, or both."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: Any = None
    ) -> None:
        if len(values) > 2:
            parser.error(
                f'{option_string} takes one or two numbers, found {len(values)}'
            )
        setattr(namespace, self.dest, (values[0], values[-1]))


def positive(text: str) -> int:
    """An argument type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} is not at least 1')
    return int(text)


def add_shape(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds ``--shape``, which becomes height and width, or None.

    Args:
        parser (argparse.ArgumentParser): Extended in place.
        text (str): The help: what has this size, and the default.
    """
    parser.add_argument(
        '--shape',
        nargs='+',
        type=positive,
        action=_Shape,
        metavar='PIXELS',
        help=f'{text}; height and width, or one number for both',
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``, the same for all tools that read a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Settings,
        metavar='KEY=VALUE',
        help='settings that override the config, for example '
        'train_cfg.max_epochs=10 model.backbone.strides="(1,2,2,1)"',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that training and testing share, named as mmpretrain's."""
    parser.add_argument('--work-dir', help='the folder for logs and checkpoints')
    parser.add_argument(
        '--verbose', action='store_true', help='show all that goes into the log file'
    )
    parser.add_argument(
        '--no-pin-memory',
        action='store_true',
        help='do not pin memory in dataloaders',
    )
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run were started',
    )
    # torch.distributed.launch passes it with a hyphen since PyTorch 2.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
