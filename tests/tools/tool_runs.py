"""Runs the command-line tools, in this process or in one of their own."""

import importlib.util
import itertools
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
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
    """As :func:`run_here`, for tools that build a runner.

    Runners of one second would share their loggers, were they not named.
    """
    options = [f'experiment_name=tool-{next(_numbers)}', *options]
    return run_here(name, config, *args, '--cfg-options', *options)


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
