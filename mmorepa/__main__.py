"""The tools as one command, ``python -m mmorepa`` or ``mmorepa``, without a shell."""

import ast
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Optional

from .utils.files import root
from .version import __version__

# Tools for work on a clone, such as the compiler of mmcv, are not among them.
COMMANDS = {
    'quickstart': 'quickstart.py',
    'train': 'train.py',
    'test': 'test.py',
    'predict': 'predict.py',
    'deploy': 'model_converters/switch_to_deploy.py',
    'export_onnx': 'deployment/export_onnx.py',
    'quantize': 'deployment/quantize.py',
    'convert': 'model_converters/published_to_mmorepa.py',
    'convert_plain': 'model_converters/plain_to_mmorepa.py',
    'build_fold': 'build_fold.py',
    'digits': 'dataset_converters/digits.py',
    'fashion_mnist': 'dataset_converters/fashion_mnist.py',
    'draw': 'analysis_tools/draw_predictions.py',
    'curves': 'analysis_tools/training_curves.py',
    'branch_shares': 'analysis_tools/branch_shares.py',
    'branch_similarity': 'analysis_tools/branch_similarity.py',
    'flops': 'analysis_tools/get_flops.py',
}


def usage() -> str:
    """The commands, each with the first line of the docstring of its tool."""
    width = max(map(len, COMMANDS))
    lines = [
        'usage: python -m mmorepa COMMAND …',
        '       python -m mmorepa --version',
        '',
        'COMMAND --help tells what it takes. The commands are:',
        '',
    ]
    for name, path in COMMANDS.items():
        source = (root() / 'tools' / path).read_text(encoding='utf-8')
        summary = (ast.get_docstring(ast.parse(source)) or '').partition('\n')[0]
        lines.append(f'  {name:{width}}  {summary}')
    return '\n'.join(lines)


def versions() -> str:
    """Two lines: the version of this package, and the versions of related packages."""
    packages = []
    for name in ('torch', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg'):
        try:
            packages.append(f'{name} {import_module(name).__version__}')
        except Exception as error:  # MMPretrain asserts that MMCV's version fits.
            packages.append(f'{name} cannot be imported ({error})')
    python = f'Python {platform.python_version()}'
    return f'mmorepa {__version__}, {python}\n{", ".join(packages)}'


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs a tool in the place of this process, by ``argv`` or the process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ('-h', '--help'):
        print(usage())
        return
    if arguments[0] == '--version':
        print(versions())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        advice = f'did you mean {close[0]!r}? ' if close else ''
        sys.exit(
            f'error: no command {name!r}; {advice}there are: {", ".join(COMMANDS)}'
        )
    # The path of a tool begins with its own folder. ``python -m`` began with the
    # working folder, where the modules of custom_imports may lie, and this package.
    paths = [os.getcwd(), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(paths),
        'MMOREPA_COMMAND': name,
    }
    # A new interpreter imports this package as a whole, after the tool has set how
    # threads wait.
    line = [sys.executable, str(root() / 'tools' / COMMANDS[name]), *rest]
    if os.name == 'posix':
        sys.stdout.flush()
        os.execve(line[0], line, environment)
    # On Windows, the shell would take exec for the end of the program.
    sys.exit(subprocess.call(line, env=environment))


if __name__ == '__main__':
    main()
