"""What people get who install the package, and have no clone."""

import os
import sys

import pytest
import torch
from tool_runs import build_model, run_apart

import mmorepa
from mmorepa.__main__ import COMMANDS

pytestmark = pytest.mark.slow


@pytest.fixture
def run(site, tmp_path):
    """Runs a command line on the installed wheel, in a folder of its own."""

    def run(*line):
        path = f'{site / "bin"}{os.pathsep}{os.environ["PATH"]}'
        done = run_apart(*line, cwd=tmp_path, PYTHONPATH=str(site), PATH=path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.splitlines()

    return run


def test_wheel_carries_what_mim_looks_for(wheel, names, source):
    files = names(wheel)
    carried = {f'configs/{name}.py' for name in mmorepa.list_configs()}
    carried |= {f'tools/{path}' for path in COMMANDS.values()}
    carried |= {'model-index.yml', 'configs/imagenet/metafile.yml', 'tools/start.py'}
    assert {f'mmorepa/.mim/{name}' for name in carried} <= files
    # How the documents were made is no tool.
    assert not [name for name in files if '/tools/benchmarks/' in name]
    assert {'mmorepa/py.typed', 'mmorepa/functional/csrc/fold.cpp'} <= files
    assert not [name for name in files if name.startswith(('tests', 'tools', 'setup'))]
    assert (source / 'tests' / 'packaging').is_dir()
    # The build left no copies in the tree.
    assert not (source / 'mmorepa' / '.mim').exists()


CODE = """
import sys
import mmorepa
from mmorepa.functional import compiled

print(mmorepa.__file__)
print(mmorepa.get_config('imagenet/resnet50-orepa_4xb64_in1k').filename)
own = mmorepa.get_config('own.py').model.backbone
print(own.block, own.depth)
print(len(mmorepa.list_configs()))
print(compiled.build())
import mmpretrain
mmorepa.register_models()
print(*mmpretrain.list_models('resnet18-orepa_*'))
print(type(mmpretrain.get_model('resnet18-orepa_4xb64_in1k').backbone).__module__)
"""


def test_package(run, site, tmp_path):
    """Configs by name, the compiled folds, and the models of mmpretrain."""
    from mmorepa.functional import compiled

    pytest.importorskip('mmpretrain')
    (tmp_path / 'own.py').write_text(
        "_base_ = 'mmorepa::imagenet/resnet18-orepa_4xb64_in1k.py'\n"
        "model = dict(backbone=dict(block='dbb'))\n"
    )
    printed = run(sys.executable, '-c', CODE)
    package = site / 'mmorepa'
    assert printed[:5] == [
        str(package / '__init__.py'),
        str(package / '.mim/configs/imagenet/resnet50-orepa_4xb64_in1k.py'),
        'dbb 18',
        str(len(mmorepa.list_configs())),
        str(compiled.build()),
    ]
    # One stack prints a line between.
    assert 'resnet18-orepa_4xb64_in1k' in printed[5:-1]
    assert printed[-1] == 'mmorepa.backbones.orepa_resnet'


def test_commands(run, tmp_path):
    """A tool by the name of a config, in a folder that has none."""
    text = '\n'.join(run('mmorepa', '--help'))
    assert all(f'\n  {name} ' in text for name in COMMANDS)
    name = 'digits/resnet18-slim-orepa_1xb64_digits'
    model = build_model(mmorepa.get_config(name))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    run(sys.executable, '-m', 'mmorepa', 'deploy', name, 'a.pth', 'b.pth')
    assert (tmp_path / 'b.pth').is_file() and (tmp_path / 'b_config.py').is_file()
