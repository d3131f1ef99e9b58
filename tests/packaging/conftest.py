"""The wheel, built and installed beside the repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributions import build

ROOT = Path(__file__).parents[2]
# What is not in the repository, and would only take time to copy.
IGNORED = ('.*', 'work_dirs', 'data', 'build', 'dist', '*.egg-info', '__pycache__')


@pytest.fixture(scope='session')
def tree(tmp_path_factory):
    """A copy of the repository, where a build leaves what it leaves."""
    target = tmp_path_factory.mktemp('tree') / 'mmorepa'
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*IGNORED))
    return target


@pytest.fixture(scope='session')
def wheel(tree, tmp_path_factory):
    return build('wheel', tree, tmp_path_factory.mktemp('wheel') / 'out')


@pytest.fixture(scope='session')
def site(wheel, tmp_path_factory):
    """A folder with the installed wheel, for PYTHONPATH."""
    target = tmp_path_factory.mktemp('site') / 'site'
    line = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
    line += ['--no-index', '--disable-pip-version-check', '--target', target, wheel]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
