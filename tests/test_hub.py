import importlib
import os
import subprocess
import sys

import pytest
from mmengine.config import Config

import mmorepa
from mmorepa.__main__ import COMMANDS, main
from mmorepa.hub import find_config, list_configs, root

NAME = 'imagenet/resnet18-orepa_4xb64_in1k'


class TestFindConfig:
    @pytest.mark.parametrize(
        'name',
        [NAME, f'{NAME}.py', f'mmorepa::{NAME}', NAME.partition('/')[2]],
    )
    def test_of_this_package(self, name):
        assert find_config(name) == root() / 'configs' / f'{NAME}.py'

    def test_files_go_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        own = tmp_path / f'{NAME}.py'
        own.parent.mkdir()
        own.touch()
        assert find_config(f'{NAME}.py').resolve() == own
        assert find_config(f'mmorepa::{NAME}.py') != own

    @pytest.mark.parametrize(
        'name', ['imagenet/resnet18-orepa_4xb64', 'resnet18-orepa', 'resnet18_orepa']
    )
    def test_close_names(self, name):
        with pytest.raises(FileNotFoundError, match=f'close are: .*{NAME}'):
            find_config(name)

    @pytest.mark.parametrize(
        'name', ['resnet/resnet18_8xb16_cifar10.py', 'resnet18_8xb16_cifar10']
    )
    def test_of_a_toolbox(self, name):
        pytest.importorskip('mmpretrain')
        found = find_config(f'mmpretrain::{name}')
        assert found.name == 'resnet18_8xb16_cifar10.py'
        with pytest.raises(FileNotFoundError, match='mmpretrain; close are: resnet/'):
            find_config('mmpretrain::resnet18_8xb16_cifar1')
        with pytest.raises(FileNotFoundError, match="no package 'none_such'"):
            find_config('none_such::resnet18')


def test_every_config_is_listed_and_read():
    names = list_configs()
    configs = root() / 'configs'
    pieces = {*configs.glob('_base_/**/*.py')}
    assert pieces and len({*names}) == len(names)
    assert len(names) == len({*configs.glob('**/*.py')} - pieces)
    assert list_configs('imagenet/resnet18-orepa_*') == [NAME]
    for name in names:
        assert mmorepa.get_config(name).model


class TestMistakes:
    def test_syntax(self, tmp_path):
        """The line may be in a base, or in a module that is imported."""
        (tmp_path / 'base.py').write_text('model = dict()\nmodel = (\n')
        (tmp_path / 'own.py').write_text("_base_ = './base.py'\n")
        for name in ('base', 'own'):
            with pytest.raises(ValueError, match="base.py', line 2: "):
                mmorepa.get_config(tmp_path / f'{name}.py')

    def test_syntax_of_a_module(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / 'broken_module.py').write_text('(\n')
        path = tmp_path / 'own.py'
        path.write_text("custom_imports = dict(imports=['broken_module'])\n")
        with pytest.raises(ValueError, match="broken_module.py', line 1: "):
            mmorepa.get_config(path)

    @pytest.mark.parametrize(
        ('name', 'words'), [('a.txt', 'is no config'), ('a.py', "has no 'model'")]
    )
    def test_no_config(self, tmp_path, name, words):
        (tmp_path / name).write_text('a = 1\n')
        with pytest.raises(ValueError, match=words):
            mmorepa.get_config(tmp_path / name)


class TestScheme:
    def test_base(self, tmp_path):
        path = tmp_path / 'own.py'
        path.write_text(f"_base_ = ['mmorepa::{NAME}.py']\nwork_dir = 'mine'\n")
        cfg = Config.fromfile(path)
        assert cfg.model == mmorepa.get_config(NAME).model
        assert cfg.work_dir == 'mine'
        # Types are looked for in the scope of the config, which is mmpretrain.
        assert '_scope_' not in cfg.pretty_text

    def test_other_packages_are_left_to_mmengine(self, tmp_path):
        pytest.importorskip('mmdet')
        path = tmp_path / 'own.py'
        path.write_text("_base_ = 'mmdet::_base_/default_runtime.py'\n")
        assert Config.fromfile(path).default_scope == 'mmdet'
        path.write_text("_base_ = 'nobody::_base_/default_runtime.py'\n")
        with pytest.raises(AssertionError, match='does not support to load nobody'):
            Config.fromfile(path)


def test_models_of_mmpretrain():
    """Twice does no harm, and theirs are there as before."""
    mmpretrain = pytest.importorskip('mmpretrain')
    mmorepa.register_models()
    mmorepa.register_models()
    names = mmpretrain.list_models('*orepa*')
    configs = list_configs('imagenet/*orepa*_4xb64*')
    assert {f'imagenet/{name}' for name in names} == {*configs}
    assert 'resnet50_8xb32_in1k' in mmpretrain.list_models()
    model = mmpretrain.get_model(NAME.partition('/')[2], backbone=dict(base_channels=8))
    assert isinstance(model.backbone, mmorepa.backbones.OREPAResNet)


class TestCommands:
    @pytest.mark.parametrize('line', [[], ['--help'], ['-h']])
    def test_help(self, capsys, line):
        main(line)
        lines = capsys.readouterr().out.splitlines()
        for name in COMMANDS:
            (found,) = [line for line in lines if line.startswith(f'  {name} ')]
            assert len(found.split()) > 3

    def test_versions(self, capsys, monkeypatch):
        main(['--version'])
        package, others = capsys.readouterr().out.splitlines()
        assert package.startswith(f'mmorepa {mmorepa.__version__}, Python 3.')
        for name in ('torch', 'mmengine', 'mmcv'):
            assert f'{name} {importlib.import_module(name).__version__}, ' in others
        assert ', mmdet ' in others and ', mmseg ' in others
        monkeypatch.setitem(sys.modules, 'mmpretrain', None)
        main(['--version'])
        assert ', mmpretrain cannot be imported (' in capsys.readouterr().out

    def test_unknown(self):
        with pytest.raises(SystemExit, match="error: no command 'trian'; .*train, "):
            main(['trian'])
        with pytest.raises(SystemExit, match="did you mean 'export_onnx'"):
            main(['export-onnx'])

    def test_takes_the_place_of_the_process(self, monkeypatch):
        calls, environments = [], []
        monkeypatch.setenv('PYTHONPATH', 'theirs')

        def call(*words, env=None):
            calls.append(words[0])
            environments.append(env or words[-1])
            return 3

        monkeypatch.setattr(os, 'execve', call)
        # What is left where exec does not replace the process.
        monkeypatch.setattr(subprocess, 'call', call)
        before = dict(os.environ)
        with pytest.raises(SystemExit) as error:
            main(['deploy', 'a', '--json', 'b'])
        assert error.value.code == 3
        tool = root() / 'tools/model_converters/switch_to_deploy.py'
        assert calls[-1] == [sys.executable, str(tool), 'a', '--json', 'b']
        # Modules beside a config are found, as by any ``python -m``.
        for env in environments:
            assert env['PYTHONPATH'] == os.pathsep.join([os.getcwd(), 'theirs'])
            assert env['MMOREPA_COMMAND'] == 'deploy'
        # A command that this process starts later is another one.
        assert dict(os.environ) == before
