"""Predictions by the toolboxes' own inferencers, each in a process of its own."""

import cv2
import numpy as np
import pytest
import torch
from helpers import import_models, trained_like
from tool_runs import ROOT, command, run_apart, tool

import mmorepa
from mmorepa.runs import build_model

CONFIGS = {
    'mmpretrain': 'digits/resnet18-slim-orepa_1xb64_digits',
    'mmdet': 'digits/retinanet_r18-slim-orepa_fpn_1xb2-10e_digits',
    'mmseg': 'digits/pspnet_r18-slim-orepa-d8_1xb8-2500_digits',
}
WORDS = {'mmpretrain': '%, ', 'mmdet': ' object', 'mmseg': ' %'}


@pytest.fixture
def images(tmp_path):
    """A folder with two images, one of them further down."""
    generator = np.random.default_rng(0)
    for name in ('images/a.png', 'images/more/b.jpg'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(256, size=(64, 96, 3), dtype=np.uint8)
        cv2.imwrite(str(path), pixels)
    (tmp_path / 'images' / 'notes.txt').touch()
    return tmp_path / 'images'


@pytest.mark.slow
@pytest.mark.parametrize('scope', CONFIGS)
def test_folder(scope, images, tmp_path):
    import_models(scope)
    if scope == 'mmdet':
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    cfg = mmorepa.get_config(CONFIGS[scope])
    model = trained_like(build_model(cfg))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    line = command('predict.py', CONFIGS[scope], 'a.pth', images, '--out', 'drawn')
    done = run_apart(*line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *found, last = done.stdout.splitlines()
    assert [line.partition(':')[0] for line in found] == [
        str(images / name) for name in ('a.png', 'more/b.jpg')
    ]
    assert all(WORDS[scope] in line for line in found)
    assert last == 'Wrote 2 images to drawn.'
    drawn = sorted(p for p in (tmp_path / 'drawn').rglob('*') if p.is_file())
    assert [p.name for p in drawn] == ['a.png', 'b.jpg']
    assert not done.stderr


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('none.png', "no image at 'none.png'"),
        ('images/more/.', 'no image in'),
        ('images/broken.png', "'images/broken.png' cannot be read as an image"),
        ('images/a.png images/../images/a.png', 'is the same file'),
    ],
)
def test_mistakes(line, words, images, tmp_path, monkeypatch):
    import_models('mmpretrain')
    monkeypatch.chdir(tmp_path)
    (images / 'more' / 'b.jpg').unlink()
    (images / 'broken.png').write_bytes((images / 'a.png').read_bytes()[:50])
    cfg = mmorepa.get_config(CONFIGS['mmpretrain'])
    torch.save(build_model(cfg).state_dict(), 'a.pth')
    words = f'^error: .*{words}'
    with pytest.raises(SystemExit, match=words):
        tool('predict.py').main([CONFIGS['mmpretrain'], 'a.pth', *line.split()])


@pytest.mark.slow
def test_predicts_what_the_model_does(images, tmp_path):
    """The page's lines of Python, for both forms of a checkpoint."""
    import_models('mmpretrain')
    cfg = mmorepa.get_config(CONFIGS['mmpretrain'])
    model = trained_like(build_model(cfg))
    meta = dict(dataset_meta=dict(classes=[f'c{i}' for i in range(10)]))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), tmp_path / 'a.pth')
    deployed = mmorepa.switch_to_deploy(model).state_dict()
    torch.save(dict(meta=meta, state_dict=deployed), tmp_path / 'b.pth')
    text = (ROOT / 'docs' / 'predict.md').read_text()
    found = []
    for name in ('a.pth', 'b.pth'):
        code = text.split('```python\n')[1].split('```')[0]
        for ours, theirs in (
            ('flowers.py', CONFIGS['mmpretrain']),
            ('work_dirs/flowers/epoch_30.pth', name),
            ('rose.jpg', str(images / 'a.png')),
        ):
            assert ours in code
            code = code.replace(ours, theirs)
        done = run_apart('python', '-c', code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        # The toolbox shows a bar first.
        found.append(done.stdout.split()[-1].rpartition('c')[2])
    assert found[0] == found[1] and found[0] in list('0123456789')
