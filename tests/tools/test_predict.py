"""Predictions by the toolboxes' own inferencers."""

import cv2
import numpy as np
import pytest
import torch
from helpers import import_models, trained_like
from tool_runs import ROOT, build_model, command, run_apart, run_here

import mmorepa

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
def test_folder(scope, images, tmp_path, monkeypatch, capsys):
    import_models(scope)
    if scope == 'mmdet':
        pytest.importorskip('mmcv.ops', exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    model = trained_like(build_model(mmorepa.get_config(CONFIGS[scope])))
    torch.save(dict(state_dict=model.state_dict()), 'a.pth')
    line = ['predict.py', CONFIGS[scope], 'a.pth', images, '--out', 'drawn']
    if scope == 'mmdet':
        done = run_apart(*command(*line), cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr
        printed = done.stdout
    else:
        run_here(*line)
        printed = capsys.readouterr().out
    *lines, last = printed.splitlines()[-3:]
    assert [line.partition(':')[0] for line in lines] == [
        str(images / name) for name in ('a.png', 'more/b.jpg')
    ]
    assert all(WORDS[scope] in line for line in lines)
    assert last == 'Wrote 2 images to drawn.'
    drawn = sorted(p for p in (tmp_path / 'drawn').rglob('*') if p.is_file())
    assert [p.name for p in drawn] == ['a.png', 'b.jpg']


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('none.png', "no image at 'none.png'"),
        ('images/more/.', 'no image in'),
        ('images/broken.png', "'images/broken.png' cannot be read as an image"),
        ('images/a.png images/../images/a.png', 'would take the place'),
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
        run_here('predict.py', CONFIGS['mmpretrain'], 'a.pth', *line.split())


@pytest.mark.slow
def test_lines_of_the_page(images, tmp_path, monkeypatch):
    """They predict the same with both forms of a checkpoint."""
    import_models('mmpretrain')
    monkeypatch.chdir(tmp_path)
    model = trained_like(build_model(mmorepa.get_config(CONFIGS['mmpretrain'])))
    meta = dict(dataset_meta=dict(classes=[f'c{i}' for i in range(10)]))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), 'a.pth')
    deployed = mmorepa.switch_to_deploy(model).state_dict()
    torch.save(dict(meta=meta, state_dict=deployed), 'b.pth')
    text = (ROOT / 'docs' / 'predict.md').read_text()
    printed = []
    for name in ('a.pth', 'b.pth'):
        code = text.split('```python\n')[1].split('```')[0]
        for ours, theirs in (
            ('flowers.py', CONFIGS['mmpretrain']),
            ('work_dirs/flowers/epoch_30.pth', name),
            ('rose.jpg', str(images / 'a.png')),
        ):
            assert ours in code
            code = code.replace(ours, theirs)
        exec(code, dict(print=lambda *words: printed.append(words[-1])))
    assert printed[0] == printed[1] and str(printed[0]).startswith('c')
