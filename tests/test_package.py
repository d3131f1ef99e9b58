import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import mmorepa

ROOT = Path(__file__).parents[1]
# Rooms of one rank import nothing of each other, and those that are not named here
# nothing of any.
RANKS = [
    {'version'},
    {'utils'},
    {'functional'},
    {'layers'},
    {'backbones'},
    {'analysis', 'converters', 'hub'},
    {'engine'},
    {'runs'},
    {'cli', 'deployment'},
    {'__init__'},
    {'__main__'},
]


def imported_rooms(path):
    """The rooms of the package that a module in it imports."""
    parents = path.relative_to(ROOT).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split('.') for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(parents[: len(parents) + 1 - node.level] if node.level else ())
            start += node.module.split('.') if node.module else []
            names = [[*start, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == 'mmorepa' and name[1:])


def test_imports_point_one_way():
    ranks = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
    found = set()
    for path in (ROOT / 'mmorepa').rglob('*.py'):
        room = path.relative_to(ROOT / 'mmorepa').parts[0].removesuffix('.py')
        if room != '.mim':  # Copies of tools, in a build.
            found |= {(room, other) for other in imported_rooms(path) if other != room}
    assert ('layers', 'functional') in found
    assert not {(a, b) for a, b in found if ranks.get(a, 0) <= ranks.get(b, 0)}


def test_version():
    assert metadata.version('mmorepa') == mmorepa.__version__


@pytest.mark.slow
def test_import_is_light_and_silent(tmp_path):
    """No toolbox is imported, since one user has mmdet and another mmseg."""
    code = (
        'import sys, torch, mmengine.runner; finders = [*sys.meta_path]\n'
        'import mmorepa; from mmengine.registry import MODELS\n'
        'print(sorted({"mmpretrain", "mmdet", "mmseg", "mmpose", "sklearn", '
        '"matplotlib.pyplot", "torchvision", "torch.utils.cpp_extension"} '
        '& set(sys.modules)))\n'
        'print("OREPAConv2d" in MODELS, "OREPAResNet" in MODELS)\n'
        'print(sys.meta_path == finders)\n'
        'allowed = torch.serialization.get_safe_globals()\n'
        'print(mmengine.logging.HistoryBuffer in allowed, mmorepa.analysis.__name__)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        '[]',
        'True True',
        'True',
        'True mmorepa.analysis',
    ]
