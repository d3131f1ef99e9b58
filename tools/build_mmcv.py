"""Builds mmcv's wheel with compiled operators, or takes it from the cache.

Run it with the Python of the environment that is to use the wheel, after torch,
ninja and setuptools < 81 are there (``tools/setup_env.sh --ops`` sees to all that)::

    python tools/build_mmcv.py --stack openmmlab

The path of the wheel is all that goes to standard output; what pip and the compiler say
goes to standard error. A plain ``pip install mmcv`` fails or silently leaves the
operators out, because mmcv's build

* needs the installed torch, which pip's build isolation hides;
* asks for C++17 while the headers of current torch demand C++20;
* parses all of torch's headers in each of its 77 files. One precompiled header saves
  more than half of the time.

Compiled code depends on Python, torch and mmcv alone, so the wheel is kept in a cache
outside the repository and serves every checkout.
"""

import argparse
import contextlib
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
# Includes mmcv's header that pulls in torch, as every file of the operators does.
HEADER = 'precompiled.hpp'
HEADER_TEXT = '#include "pytorch_cpp_helper.hpp"\n'


class BuildError(Exception):
    """The wheel could not be built; the message says why and what to do."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pinned_mmcv(stack: str) -> tuple[str, str]:
    """Returns the distribution name and the version of mmcv in a stack."""
    path = ROOT / 'requirements' / f'{stack}-ops.txt'
    match = re.search(r'^([\w-]+)==([\w.]+)$', path.read_text(), re.MULTILINE)
    if match is None:
        raise BuildError(f'{path} has no line like mmcv==2.1.0')
    return match.group(1), match.group(2)


def wants_cuda() -> bool:
    """Tells whether CUDA operators are wanted and can be compiled here.

    mmcv compiles them where torch sees a GPU or FORCE_CUDA is 1, whether or not there
    is a CUDA compiler.
    """
    import torch

    if not torch.cuda.is_available() and os.environ.get('FORCE_CUDA') != '1':
        return False
    # Warns where there is no GPU, and so is imported only now.
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        say('    There is a GPU but no CUDA toolkit (nvcc): the operators will run')
        say('    on the CPU only.')
    return CUDA_HOME is not None


def cache_folder(name: str, version: str, cuda: bool) -> Path:
    """Returns the folder of the cache that belongs to this Python, torch and mmcv."""
    import torch

    base = os.environ.get('MMOREPA_CACHE')
    if not base:
        user_cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        base = Path(user_cache) / 'mmorepa'
    python = f'cp{sys.version_info.major}{sys.version_info.minor}'
    platform = sysconfig.get_platform().replace('-', '_')
    device = '-cuda' if cuda else ''
    return (
        Path(base).absolute()
        / 'wheels'
        / f'{python}-{platform}-torch{torch.__version__}-{name}-{version}{device}'
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file for the time of the block; the system frees it at exit."""
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- the compiler that the build is given ------------------------------------------


def flags_of(arguments: list[str], source: str) -> list[str]:
    """Returns a compiler's arguments less those that name its input and outputs."""
    flags = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ('-o', '-MF'):
            next(rest)
        elif argument not in ('-c', '-MD', '-MMD', source):
            flags.append(argument)
    return flags


def precompile(compiler: str, flags: list[str], header: Path) -> None:
    """Compiles the header with the flags of a file that is about to include it."""
    part = header.with_suffix('.part')
    command = [compiler, *flags, '-x', 'c++-header', '-c', str(header), '-o', str(part)]
    if subprocess.run(command).returncode == 0:
        part.replace(precompiled(header))


def precompiled(header: Path) -> Path:
    """Returns the path at which the compiler looks for the precompiled header."""
    return header.with_name(f'{header.name}.gch')


def compile_as(compiler: str, folder: Path, arguments: list[str]) -> None:
    """Stands in for the compiler: compiles with the header precompiled beforehand.

    A precompiled header is only taken up if it was compiled with exactly the flags of
    the file that includes it, and those differ between versions of setuptools and
    torch. The first file that comes by tells them.
    """
    source = next((name for name in arguments if name.endswith('.cpp')), None)
    if source is not None and '-c' in arguments:
        header = folder / HEADER
        with locked(folder / 'lock'):
            if not header.exists():
                header.write_text(HEADER_TEXT)
                precompile(compiler, flags_of(arguments, source), header)
        if precompiled(header).exists():
            # First on the command line, since it counts only before any other code.
            arguments = ['-include', str(header), '-Winvalid-pch', *arguments]
    os.execvp(compiler, [compiler, *arguments])


def write_compiler(folder: Path) -> Path:
    """Writes the executable that the build takes for its compiler; see compile_as."""
    real = shutil.which(os.environ.get('CXX', 'g++'))
    if real is None:
        raise BuildError(
            'no C++ compiler: install one (on Debian and Ubuntu: apt-get install g++) '
            'or name it in the environment variable CXX'
        )
    command = [sys.executable, str(Path(__file__).resolve()), '--as-compiler']
    script = folder / 'g++'
    script.write_text(
        f'#!/bin/sh\nexec {shlex.join([*command, real, str(folder)])} "$@"\n'
    )
    script.chmod(0o755)
    return script


# ---- the build ---------------------------------------------------------------------


def search_path() -> str:
    """Returns PATH with the folder of this Python, whose ninja may not be on it."""
    return f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'


def check_tools() -> None:
    """Raises BuildError if something is missing that only shows minutes later."""
    include = Path(sysconfig.get_path('include'))
    if not (include / 'Python.h').is_file():
        raise BuildError(
            f'no Python.h in {include}: install the headers of this Python '
            '(on Debian and Ubuntu: apt-get install python3-dev)'
        )
    if shutil.which('ninja', path=search_path()) is None:
        raise BuildError('no ninja: pip install ninja')


def pip(*arguments: str, environment: Optional[dict[str, str]] = None) -> None:
    """Runs pip, without build isolation, which would hide the installed torch."""
    command = [sys.executable, '-m', 'pip', *arguments]
    command += ['--no-deps', '--no-build-isolation']
    if subprocess.run(command, stdout=sys.stderr, env=environment).returncode:
        raise BuildError(
            f'pip {arguments[0]} failed, see above; without the operators everything '
            'but detection works'
        )


def unpack_source(name: str, version: str, folder: Path) -> Path:
    """Downloads and unpacks mmcv's source, and mends what torch does not compile."""
    pip('download', '--no-binary', name, '--dest', str(folder), f'{name}=={version}')
    archive = next(folder.glob('*.tar.gz'))
    shutil.unpack_archive(archive, folder)
    source = archive.with_name(archive.name.removesuffix('.tar.gz'))
    # torch adds the standard that its headers need if the build names none.
    setup = source / 'setup.py'
    setup.write_text(re.sub(r"'-std=c\+\+\d\d'", '', setup.read_text()))
    return source


def run_build(source: Path, work: Path, cuda: bool) -> Path:
    """Builds the wheel from the unpacked source and returns its path."""
    folder = work / 'compiler'
    folder.mkdir()
    environment = dict(os.environ)
    environment.update(PATH=search_path(), CFLAGS='-g0 -O2')
    environment['CXX'] = str(write_compiler(folder))
    environment.setdefault('MAX_JOBS', str(len(os.sched_getaffinity(0))))
    if not cuda:
        environment.pop('FORCE_CUDA', None)
        environment['CUDA_VISIBLE_DEVICES'] = ''
    place = ['--no-cache-dir', '--wheel-dir', str(work / 'wheels'), str(source)]
    pip('wheel', '--verbose', *place, environment=environment)
    wheel = next((work / 'wheels').glob('*.whl'))
    with zipfile.ZipFile(wheel) as archive:
        if not any(re.match(r'mmcv/_ext.*\.so', name) for name in archive.namelist()):
            raise BuildError('mmcv was built without operators')
    return wheel


def find_or_build(stack: str) -> Path:
    """Returns the path of the wheel, built now unless the cache has it."""
    name, version = pinned_mmcv(stack)
    cuda = wants_cuda()
    cache = cache_folder(name, version, cuda)
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / 'lock'):
        finished = next(cache.glob('*.whl'), None)
        if finished is not None:
            return finished

        devices = 'CPU and GPU (30 minutes or more)' if cuda else 'CPU (3 to 6 minutes)'
        say(f'Compiling the operators of {name} {version} for the {devices}')
        check_tools()
        # A build that was killed could not clean up; the lock says that none is alive.
        for leftover in cache.glob('build-*'):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix='build-', dir=cache) as folder:
            work = Path(folder)
            wheel = run_build(unpack_source(name, version, work), work, cuda)
            # In one step, so that the cache never shows half a wheel.
            return wheel.replace(cache / wheel.name)


def main() -> None:
    if sys.argv[1:2] == ['--as-compiler']:
        compile_as(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--stack',
        choices=['openmmlab', 'onedl'],
        default='openmmlab',
        help='whose mmcv to build: mmcv itself or onedl-mmcv (default: %(default)s)',
    )
    arguments = parser.parse_args()
    try:
        print(find_or_build(arguments.stack))
    except BuildError as error:
        sys.exit(f'build_mmcv: {error}')


if __name__ == '__main__':
    main()
