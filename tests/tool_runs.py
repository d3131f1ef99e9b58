"""Runs the command-line tools, in this process or in one of their own."""

import importlib.util
import itertools
import os
import runpy
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from mmorepa.runs import build_model  # noqa: F401  (for the tests)

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
_numbers = itertools.count()


@cache
def tool(name):
    """The module of a tool, by its path under tools/."""
    path = TOOLS / name
    spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # For what is pickled.
    # As Python does for a script, which may import its neighbours.
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def run_here(name, *args):
    """Calls the ``main`` of a tool, and returns what it returns."""
    return tool(name).main([str(arg) for arg in args])


def run_runner(name, config, *args, options=()):
    """As :func:`run_here`, for tools that build a runner."""
    return run_here(name, config, *args, '--cfg-options', run_name(), *options)


def run_name():
    """An option for a runner: those of one second share their loggers otherwise."""
    return f'experiment_name=tool-{next(_numbers)}'


def run_tool_of(package, name, *args):
    """Runs a tool that an OpenMMLab package was installed with, in this process."""
    folder = Path(importlib.import_module(package).__file__).parent
    path = folder / '.mim' / 'tools' / name
    if not path.is_file():
        pytest.skip(f'{package} was installed without its tools')
    with mock.patch.object(sys, 'argv', [str(path), *map(str, args)]):
        runpy.run_path(str(path), run_name='__main__')


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def environment(**variables):
    """That of a process which leaves the other core to others."""
    return {
        **os.environ,
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
        **variables,
    }


def command(name, *args):
    """The command line of a tool."""
    return [sys.executable, str(TOOLS / name), *map(str, args)]


def run_apart(*line, cwd=None, timeout=300, **variables):
    """Runs a command line to its end."""
    return subprocess.run(
        [str(word) for word in line],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**variables),
        timeout=timeout,
    )


SWITCH = 'model_converters/switch_to_deploy.py'
EXPORT, QUANTIZE = 'deployment/export_onnx.py', 'deployment/quantize.py'


def skip_timing(patch, core_share=1.0):
    """Has tools print a latency that nobody measured, on a machine as busy as that."""

    def least_seconds(functions):
        return [0.001] * len(functions), core_share

    for name in (SWITCH, EXPORT, QUANTIZE):
        patch.setattr(tool(name), 'least_seconds', least_seconds)
