"""Building what people install."""

import subprocess
import sys
import zipfile


def build(kind, source, out):
    """Builds as pip and build do, in an environment that has setuptools."""
    out.mkdir()
    code = f'from setuptools import build_meta as b; b.build_{kind}({str(out)!r})'
    line = [sys.executable, '-c', code]
    done = subprocess.run(line, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    return path


def contents(wheel):
    """The files of a wheel, apart from the list of them."""
    with zipfile.ZipFile(wheel) as file:
        return {
            name: file.read(name)
            for name in file.namelist()
            if not name.endswith('RECORD')
        }
