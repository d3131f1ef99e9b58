"""What each command says of itself."""

import os
import sys

import pytest
from tool_runs import ROOT, run_apart, tool

from mmorepa.__main__ import COMMANDS


@pytest.fixture(scope='module')
def without_torch(tmp_path_factory):
    """A PYTHONPATH in which importing PyTorch fails."""
    folder = tmp_path_factory.mktemp('without')
    (folder / 'torch.py').write_text("raise AssertionError('PyTorch is imported')\n")
    return f'{folder}{os.pathsep}{ROOT}'


@pytest.mark.parametrize('name', COMMANDS)
def test_help(name, without_torch):
    """At once, that is without PyTorch, by the name of the command."""
    line = [sys.executable, '-m', 'mmorepa', name, '--help']
    done = run_apart(*line, PYTHONPATH=without_torch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'usage: python -m mmorepa {name}')
    assert f'example:\n  python -m mmorepa {name}' in done.stdout


@pytest.mark.parametrize('words', [['224'], ['224', '224']])
def test_shape_is_one_number_or_two(words):
    args = tool(COMMANDS['flops']).parse_args(['config.py', '--shape', *words])
    assert args.shape == (224, 224)
