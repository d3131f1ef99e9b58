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
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
# Stands in for the compiler. mmcv's header pulls in torch, as every file of the
# operators does. Precompiled, it is only taken up with the flags that it was compiled
# with, and those differ between versions of setuptools and torch: the first files that
# come by tell them.
COMPILER = """#!/bin/bash
if [[ "$*" == *.cpp* ]]; then
  words=()
  for word; do
    case $word in
      *.cpp) word=HEADER ;;
      *.o) word=HEADER.$$ ;;
    esac
    words+=("$word")
  done
  if [[ ! -e HEADER.gch ]]; then
    COMPILER -x c++-header "${words[@]}" && mv HEADER.$$ HEADER.gch
  fi
  set -- -include HEADER "$@"
fi
exec COMPILER "$@"
"""


def fail(message: str) -> None:
    sys.exit(f'build_mmcv: {message}')


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
        print('    No nvcc: the operators will run on the CPU only.', file=sys.stderr)
    return CUDA_HOME is not None


def cache_folder(name: str, version: str, cuda: bool) -> Path:
    """Returns the folder of the cache that belongs to this Python, torch and mmcv."""
    import torch

    base = os.environ.get('MMOREPA_CACHE') or Path.home() / '.cache/mmorepa'
    python = f'cp{sys.version_info.major}{sys.version_info.minor}'
    platform = sysconfig.get_platform().replace('-', '_')
    place = f'{python}-{platform}-torch{torch.__version__}-{name}-{version}'
    return Path(base).absolute() / 'wheels' / (place + '-cuda' * cuda)


def write_compiler(folder: Path) -> Path:
    """Writes the executable that the build takes for its compiler."""
    compiler = shutil.which(os.environ.get('CXX', 'g++'))
    if compiler is None:
        fail('no C++ compiler: install one (g++), or name it in CXX')
    header, script = folder / 'precompiled.hpp', folder / 'g++'
    header.write_text('#include "pytorch_cpp_helper.hpp"\n')
    text = COMPILER.replace('COMPILER', shlex.quote(compiler))
    script.write_text(text.replace('HEADER', shlex.quote(str(header))))
    script.chmod(0o755)
    return script


def search_path() -> str:
    """Returns PATH with the folder of this Python, whose ninja may not be on it."""
    return f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'


def pip(*arguments: object, environment: Optional[dict[str, str]] = None) -> None:
    """Runs pip, without build isolation, which would hide the installed torch."""
    command = [sys.executable, '-m', 'pip', *map(str, arguments)]
    command += ['--no-deps', '--no-build-isolation']
    if subprocess.run(command, stdout=sys.stderr, env=environment).returncode:
        fail(
            f'pip {arguments[0]} failed, see above; without the operators everything '
            'but detection works'
        )


def build(name: str, version: str, work: Path, cuda: bool) -> Path:
    """Builds the wheel from mmcv's source, and returns its path."""
    pip('download', '--no-binary', name, '--dest', work, f'{name}=={version}')
    archive = next(work.glob('*.tar.gz'))
    shutil.unpack_archive(archive, work)
    source = archive.with_name(archive.name.removesuffix('.tar.gz'))
    # torch adds the standard that its headers need if the build names none.
    setup = source / 'setup.py'
    setup.write_text(re.sub(r"'-std=c\+\+\d\d'", '', setup.read_text()))

    environment = {**os.environ, 'PATH': search_path(), 'CFLAGS': '-g0 -O2'}
    environment['CXX'] = str(write_compiler(work))
    environment.setdefault('MAX_JOBS', str(len(os.sched_getaffinity(0))))
    if not cuda:
        environment.pop('FORCE_CUDA', None)
        environment['CUDA_VISIBLE_DEVICES'] = ''
    place = ('--no-cache-dir', '--wheel-dir', work / 'wheels', source)
    pip('wheel', '--verbose', *place, environment=environment)
    wheel = next((work / 'wheels').glob('*.whl'))
    with zipfile.ZipFile(wheel) as content:
        if not any(re.match(r'mmcv/_ext.*\.so', file) for file in content.namelist()):
            fail('mmcv was built without operators')
    return wheel


def find_or_build(stack: str) -> Path:
    """Returns the path of the wheel, built now unless the cache has it."""
    pinned = (ROOT / 'requirements' / f'{stack}-ops.txt').read_text()
    name, version = re.search(r'^([\w-]+)==([\w.]+)$', pinned, re.MULTILINE).groups()
    cuda = wants_cuda()
    cache = cache_folder(name, version, cuda)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finished = next(cache.glob('*.whl'), None)
        if finished is not None:
            return finished
        devices = 'CPU and GPU (30 minutes or more)' if cuda else 'CPU (3 to 6 minutes)'
        message = f'Compiling the operators of {name} {version} for the {devices}'
        print(message, file=sys.stderr, flush=True)
        # A build that was killed could not clean up; the lock says that none is alive.
        for leftover in cache.glob('build-*'):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix='build-', dir=cache) as folder:
            wheel = build(name, version, Path(folder), cuda)
            # In one step, so that the cache never shows half a wheel.
            return wheel.replace(cache / wheel.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--stack',
        choices=['openmmlab', 'onedl'],
        default='openmmlab',
        help='whose mmcv to build: mmcv itself or onedl-mmcv (default: %(default)s)',
    )
    print(find_or_build(parser.parse_args().stack))


if __name__ == '__main__':
    main()
