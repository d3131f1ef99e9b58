"""The wheel, built from the source distribution and installed beside the repository."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from tool_runs import ROOT

# What is not in the repository, and would only take time to copy.
IGNORED = ('.*', 'work_dirs', 'data', 'build', 'dist', '*.egg-info', '__pycache__')


def python(*words, cwd=None):
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='session')
def build():
    """Builds as pip and build do, in an environment that has setuptools."""

    def build(kind, source, out):
        out.mkdir()
        code = f'from setuptools import build_meta as b; b.build_{kind}({str(out)!r})'
        python('-c', code, cwd=source)
        (path,) = out.iterdir()
        return path

    return build


@pytest.fixture(scope='session')
def source(build, tmp_path_factory):
    """What the source distribution holds."""
    folder = tmp_path_factory.mktemp('sdist')
    tree = folder / 'tree'
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED))
    sdist = build('sdist', tree, folder / 'dist')
    shutil.unpack_archive(sdist, folder)  # Python 3.11.2 has no tarfile filter.
    (source,) = folder.glob('mmorepa-*')
    return source


@pytest.fixture(scope='session')
def wheel(build, source, tmp_path_factory):
    return build('wheel', source, tmp_path_factory.mktemp('wheel') / 'out')


@pytest.fixture(scope='session')
def site(wheel, tmp_path_factory):
    """A folder with the installed wheel, for PYTHONPATH."""
    target = tmp_path_factory.mktemp('site') / 'site'
    flags = ['--quiet', '--no-deps', '--no-index', '--disable-pip-version-check']
    python('-m', 'pip', 'install', *flags, '--target', target, wheel)
    return target


@pytest.fixture(scope='session')
def names():
    """The files in a wheel."""

    def names(wheel):
        with zipfile.ZipFile(wheel) as file:
            return set(file.namelist())

    return names
