"""Mistakes of newcomers: one line says what was wrong and what to do."""

import shutil

import pytest
import torch
from helpers import import_models
from tool_runs import run_here, run_runner

FLOPS = 'analysis_tools/get_flops.py'
CONVERT = 'model_converters/published_to_mmorepa.py'


def answer(name, *args, options=None):
    """The line that a tool ends with."""
    with pytest.raises(SystemExit) as exit:
        if options is None:
            run_here(name, *args)
        else:
            run_runner(name, *args, options=options)
    assert '\n' not in str(exit.value)
    return str(exit.value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import_models('mmpretrain')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ('model', 'words'),
    [
        ("conv_cfg=dict(type='OREPAConv2D')", "did you mean 'OREPAConv2d'?"),
        ("type='OREPAResNett'", "did you mean 'OREPAResNet'?"),
        ("type='Nothing'", "type='Nothing' is not in the model registry"),
    ],
)
def test_misspelt_type(model, words, folder):
    if 'conv_cfg' in model:
        model += ", type='ResNet', depth=18, _delete_=True"
    (folder / 'mine.py').write_text(
        "_base_ = 'mmorepa::imagenet/resnet18_4xb64_in1k.py'\n"
        f'model = dict(backbone=dict({model}))\n'
    )
    assert words in answer(FLOPS, 'mine.py', '--shape', '32')


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_broken_image(workers, config, digits, folder):
    shutil.copytree(digits / 'val', folder / 'val')
    path = sorted((folder / 'val').rglob('*.png'))[0]
    path.write_bytes(path.read_bytes()[:40])
    data = 'train_dataloader.dataset'
    options = [
        f'{data}.data_root={folder}',
        f'{data}.data_prefix=val',
        f'{data}.indices=16',
        f'train_dataloader.num_workers={workers}',
    ]
    text = answer('train.py', config, '--work-dir', folder / 'w', options=options)
    assert text.startswith(f"error: '{path}' cannot be read as an image")


def test_other_checkpoints(config, folder):
    torchvision = pytest.importorskip('torchvision')
    torch.save(torchvision.models.resnet18().state_dict(), 'plain.pth')
    (folder / 'junk.pth').write_bytes(b'hello world, this is no checkpoint')
    state = {'stage1.0.conv2.weight_orepa_origin': torch.ones(1)}
    torch.save(state, 'published.pth')
    test = ['test.py', config]
    assert 'mmorepa convert_plain`' in answer(*test, 'plain.pth', options=[])
    assert '-m mmorepa convert`' in answer(*test, 'published.pth', options=[])
    assert 'mmorepa convert_plain`' in answer(CONVERT, 'plain.pth', 'out.pth')
    text = answer(*test, 'junk.pth', options=[])
    assert text.endswith('it is no file of torch.save')
