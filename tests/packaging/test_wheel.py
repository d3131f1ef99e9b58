"""What people get who install the package, and have no clone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributions import build, contents

import mmorepa
from mmorepa.__main__ import COMMANDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(site, tmp_path):
    """Runs a command line on the installed wheel, in a folder of its own."""
    path = f'{site / "bin"}{os.pathsep}{os.environ["PATH"]}'
    environment = {
        **os.environ,
        'PYTHONPATH': str(site),
        'PATH': path,
        'OMP_NUM_THREADS': '1',
    }

    def run(*line):
        done = subprocess.run(
            [str(word) for word in line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def python(run, site):
    """Runs code that imports the installed package, and returns what it prints."""

    def python(code):
        where, *printed = run(
            sys.executable, '-c', f'import mmorepa; print(mmorepa.__file__)\n{code}'
        ).splitlines()
        assert where == str(site / 'mmorepa' / '__init__.py')
        return printed

    return python


# How the documents were made is no tool.
STUDIES = {'__pycache__', 'benchmarks', 'drawings.py', 'model_zoo.py'}
STUDIES.add('scaling_experiment.py')


def test_wheel_carries_what_mim_looks_for(wheel):
    files = contents(wheel)
    for name in ('configs', 'tools'):
        expected = {
            f'mmorepa/.mim/{path.relative_to(ROOT).as_posix()}'
            for path in (ROOT / name).rglob('*')
            if path.is_file() and not STUDIES & {*path.parts}
        }
        assert expected == {n for n in files if n.startswith(f'mmorepa/.mim/{name}/')}
    assert files['mmorepa/.mim/model-index.yml']
    assert 'mmorepa/py.typed' in files and 'mmorepa/functional/csrc/fold.cpp' in files
    assert not [name for name in files if name.startswith(('tests', 'tools', 'setup'))]


def test_build_leaves_no_copies_in_the_tree(wheel, tree):
    assert not (tree / 'mmorepa' / '.mim').exists()


def test_sdist_builds_the_same_wheel(tree, wheel, tmp_path):
    sdist = build('sdist', tree, tmp_path / 'sdist')
    shutil.unpack_archive(sdist, tmp_path)  # Python 3.11.2 has no tarfile filter.
    (source,) = tmp_path.glob('mmorepa-*')
    assert (source / 'tests' / 'packaging').is_dir()
    assert contents(build('wheel', source, tmp_path / 'wheel')) == contents(wheel)


def test_second_build_forgets_what_is_gone(tree, tmp_path):
    source = tmp_path / 'source'
    shutil.copytree(tree, source)
    extra = source / 'configs' / 'imagenet' / 'extra.py'
    extra.write_text('')
    name = 'mmorepa/.mim/configs/imagenet/extra.py'
    assert name in contents(build('wheel', source, tmp_path / 'first'))
    extra.unlink()
    assert name not in contents(build('wheel', source, tmp_path / 'second'))


def test_configs_by_name(python, tmp_path, site):
    (tmp_path / 'own.py').write_text(
        "_base_ = 'mmorepa::imagenet/resnet18-orepa_4xb64_in1k.py'\n"
        "model = dict(backbone=dict(block='dbb'))\n"
    )
    code = """
cfg = mmorepa.get_config('imagenet/resnet50-orepa_4xb64_in1k')
print(cfg.model.backbone.depth, cfg.filename)
own = mmorepa.get_config('own.py')
print(own.model.backbone.block, own.model.backbone.depth)
from mmengine.config import Config
print(Config.fromfile('own.py').model == own.model)
print(len(mmorepa.list_configs()))
"""
    first, *rest = python(code)
    path = site / 'mmorepa/.mim/configs/imagenet/resnet50-orepa_4xb64_in1k.py'
    assert first == f'50 {path}'
    assert rest == ['dbb 18', 'True', str(len(mmorepa.list_configs()))]


def test_models_of_mmpretrain(python):
    code = """
import sys
print('mmpretrain' in sys.modules)
import mmpretrain
print(*mmpretrain.list_models('resnet18*orepa*'))
print(type(mmpretrain.get_model('resnet18-orepa_4xb64_in1k').backbone).__module__)
"""
    pytest.importorskip('mmpretrain')
    imported, names, *_, module = python(code)  # One stack prints a line between.
    assert imported == 'False'
    assert names == (
        'resnet18-1.5x-orepa_4xb64_in1k resnet18-2x-orepa_4xb64_in1k '
        'resnet18-orepa_4xb64_in1k'
    )
    assert module == 'mmorepa.backbones.orepa_resnet'


def test_quickstart(run, tmp_path):
    """The data, training, testing and switching, each by its tool."""
    pytest.importorskip('mmpretrain')
    pytest.importorskip('sklearn')
    assert 'deployed' in run('mmorepa', 'quickstart', '--epochs', 1)
    summary = json.loads((tmp_path / 'work_dirs/quickstart/summary.json').read_text())
    assert summary['params_deploy'] < summary['params_train']
    assert summary['train_top1'] == pytest.approx(summary['deploy_top1'], abs=0.3)


def test_conversion(run, tmp_path):
    """By name of the config, from a plain network."""
    pytest.importorskip('mmpretrain')
    models = pytest.importorskip('torchvision.models')
    torch.save(models.resnet18().state_dict(), tmp_path / 'plain.pth')
    config = 'resnet18-orepa_4xb64_in1k'
    line = [sys.executable, '-m', 'mmorepa']
    run(*line, 'convert_plain', 'plain.pth', config, 'ours.pth')
    assert (tmp_path / 'ours.pth').is_file()


def test_compiler(run):
    from mmorepa.functional import compiled

    (path,) = run(sys.executable, '-m', 'mmorepa', 'build_fold').splitlines()
    assert os.path.isfile(path)
    assert path == str(compiled.build())


def test_help(run):
    text = run('mmorepa', '--help')
    assert all(f'\n  {name} ' in text for name in COMMANDS)
