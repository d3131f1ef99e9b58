import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import mmorepa
from mmorepa import backbones, engine, functional, layers

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('module', [mmorepa, backbones, engine, functional, layers])
def test_exports(module):
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_version():
    assert metadata.version('mmorepa') == mmorepa.__version__


@pytest.mark.slow
def test_import_is_light_and_silent(tmp_path):
    """No toolbox is imported, since one user has mmdet and another mmseg."""
    code = (
        'import sys, mmorepa; from mmengine.registry import MODELS\n'
        'print(sorted({"mmpretrain", "mmdet", "mmseg", "mmpose", "sklearn", '
        '"matplotlib.pyplot", "torchvision"} & set(sys.modules)))\n'
        'print("OREPAConv2d" in MODELS, "OREPAResNet" in MODELS)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ['[]', 'True True']
