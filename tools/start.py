"""What a command starts with, before PyTorch is loaded.

Importing mmorepa loads PyTorch, which takes seconds. A tool imports this file instead,
defines its ``parse_args`` and calls it: help and mistakes are answered at once.
"""

import argparse
import os
import warnings
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

# Waiting threads of GNU OpenMP run in circles first, and on a machine that is busy with
# other programs they take the time of those that they wait for. PyTorch reads this when
# it is loaded.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

# The lite form of MMCV, which is all that classifiers need, warns at every import.
warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')

# By its path: the package around it would be imported first.
_path = Path(find_spec('mmorepa').origin).parent / 'cli' / 'parser.py'
_spec = spec_from_file_location('mmorepa_parser', _path)
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)

Parser = _module.Parser
add_common_arguments = _module.add_common_arguments
add_config_options = _module.add_config_options
add_shape = _module.add_shape
positive = _module.positive


def model_parser(description: str, out: str, also: str = '') -> argparse.ArgumentParser:
    """The parser of a figure about a trained model."""
    parser = Parser(description, 'my_config.py work_dirs/my_config/epoch_30.pth')
    parser.add_argument('config', help='the config of the training')
    parser.add_argument('checkpoint', help='the training checkpoint')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path(out),
        help=f'the PNG to write (default: {out}); its numbers go beside it, as .csv'
        + also,
    )
    add_config_options(parser)
    return parser
