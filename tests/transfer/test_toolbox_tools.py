"""The toolboxes' own tools and inferencers, with our configs and both forms."""

import json
import os
import pickle
import socket
import sys
from pathlib import Path

import mmengine
import pytest
import torch
from helpers import import_models
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from scenes import CONFIGS, ROOT

from mmorepa.converters import deploy_checkpoint, read_checkpoint, write_checkpoint

pytestmark = pytest.mark.slow
TOOLBOXES = {
    'mmdet': 'faster-rcnn_r18-slim-orepa_fpn',
    'mmseg': 'deeplabv3plus_r18-slim-orepa',
}


def tool(scope, name):
    """A tool that the toolbox was installed with."""
    folder = Path(mmengine.utils.get_installed_path(scope))
    path = folder / '.mim' / 'tools' / name
    if not path.is_file():
        pytest.skip(f'{scope} was installed without its tools')
    return path


@pytest.fixture(scope='module', params=TOOLBOXES)
def trained(request, short_config, run_python, tmp_path_factory):
    """By the toolbox's own tools/train.py: its configs and checkpoints by form."""
    scope = request.param
    import_models(scope)
    config = short_config(TOOLBOXES[scope])
    folder = tmp_path_factory.mktemp('work')
    run_python(tool(scope, 'train.py'), config, '--work-dir', folder)
    checkpoint = (folder / 'last_checkpoint').read_text()
    deployed = folder / 'deploy.pth'
    run_python(
        'tools/model_converters/switch_to_deploy.py', config, checkpoint, deployed
    )
    deployed_config = folder / 'deploy_config.py'
    return scope, {
        'training form': (config, checkpoint),
        'deployed': (deployed_config, deployed),
        'folded while loading': (deployed_config, checkpoint),
    }


def test_own_test_tool(trained, run_python, tmp_path):
    scope, forms = trained
    results = {}
    for form in ('training form', 'deployed'):
        config, checkpoint = forms[form]
        out = tmp_path / form.replace(' ', '-')
        arguments = ['--out', f'{out}.pkl' if scope == 'mmdet' else out]
        run_python(
            tool(scope, 'test.py'), config, checkpoint, '--work-dir', out, *arguments
        )
        if scope == 'mmdet':
            with open(f'{out}.pkl', 'rb') as file:
                results[form] = [
                    r['pred_instances']['scores'] for r in pickle.load(file)
                ]
        else:
            files = sorted(out.glob('*.png'))
            results[form] = [torch.tensor(mmcv_read(file)).float() for file in files]
    before, after = results.values()
    assert len(before) == len(after) == 3
    for a, b in zip(before, after):
        assert a.shape == b.shape
        if scope == 'mmdet':
            assert a.max() > 1e-3
            assert torch.allclose(a, b, atol=1e-4)
        else:
            # Pixels whose two best classes are as good as equal.
            assert (a != b).float().mean() < 0.001


def mmcv_read(path):
    import mmcv

    return mmcv.imread(str(path), flag='unchanged')


INFER = """
import json, sys
scope, image, *files = sys.argv[1:]
for config, checkpoint in zip(files[::2], files[1::2]):
    if scope == 'mmdet':
        from mmdet.apis import DetInferencer
        infer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
        found = infer(image)['predictions'][0]['scores'][:20]
    elif scope == 'mmseg':
        from mmseg.apis import MMSegInferencer
        infer = MMSegInferencer(config, checkpoint, device='cpu')
        sample = infer(image, return_datasamples=True)
        found = sample.seg_logits.data[:, ::8, ::8].flatten().tolist()
    else:
        from mmpretrain import ImageClassificationInferencer
        infer = ImageClassificationInferencer(config, checkpoint, device='cpu')
        found = infer(image)[0]['pred_scores'].tolist()
    from mmorepa import is_switchable  # The configs have to do without.
    print('RESULT', json.dumps([is_switchable(infer.model), found]))
"""


def infer(run_python, scope, forms, image):
    """The result of each form, all in one process, whose imports take longest."""
    files = [file for pair in forms.values() for file in pair]
    out = run_python('-c', INFER, scope, image, *files)
    lines = [line for line in out.splitlines() if 'RESULT ' in line]
    assert len(lines) == len(forms)
    results = [json.loads(line.split('RESULT ')[1]) for line in lines]
    return dict(zip(forms, results))


def check_forms(results):
    """All forms say the same, and are the forms that were asked for."""
    expected = torch.tensor(results['training form'][1])
    assert expected.numel() > 5 and expected.std() > 0
    for form, (switchable, found) in results.items():
        assert switchable == (form == 'training form')
        found = torch.tensor(found)
        assert found.shape == expected.shape
        scale = expected.abs().max().item()
        assert torch.allclose(found, expected, atol=1e-4 * scale)


def test_inferencers(trained, run_python, scenes_folder):
    scope, forms = trained
    image = next(scenes_folder.glob('coco/val2017/*.png'))
    check_forms(infer(run_python, scope, forms, image))


def test_predictions_side_by_side(trained, run_python, tmp_path):
    import mmcv

    _, forms = trained
    config, checkpoint = forms['training form']
    deployed = forms['deployed'][1]
    out = tmp_path / 'folder' / 'predictions.png'
    run_python(
        'tools/analysis_tools/draw_predictions.py',
        *(config, checkpoint, deployed, out, '--images=2', '--score=0.01'),
    )
    picture = mmcv.imread(str(out))
    height, width = picture.shape[:2]
    # Two rows of three images of 192x128.
    assert width > 1000 and 0.4 < height / width < 0.6
    assert picture.std() > 10
    middle, right = (
        picture[:, i * width // 3 : (i + 1) * width // 3].astype(float) for i in (1, 2)
    )
    assert abs(middle.mean() - right.mean()) < 2
    assert [path.name for path in out.parent.iterdir()] == ['predictions.png']


def test_inferencer_of_classifiers(run_python, scenes_folder, tmp_path):
    import_models('mmpretrain')
    config = CONFIGS / 'digits/resnet18-slim-orepa_1xb64_digits.py'
    cfg = Config.fromfile(config)
    init_default_scope('mmpretrain')
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    model.init_weights()
    meta = dict(dataset_meta=dict(classes=list('0123456789')))
    checkpoint = dict(meta=meta, state_dict=model.state_dict())
    write_checkpoint(checkpoint, str(tmp_path / 'train.pth'))
    write_checkpoint(
        deploy_checkpoint(model, read_checkpoint(str(tmp_path / 'train.pth'))),
        str(tmp_path / 'deploy.pth'),
    )
    deployed = tmp_path / 'deployed.py'
    deployed.write_text(
        f"_base_ = '{config}'\nmodel = dict(backbone=dict(deploy=True))\n"
    )
    forms = {
        'training form': (config, tmp_path / 'train.pth'),
        'deployed': (deployed, tmp_path / 'deploy.pth'),
        'folded while loading': (deployed, tmp_path / 'train.pth'),
    }
    image = next(scenes_folder.glob('coco/val2017/*.png'))
    check_forms(infer(run_python, 'mmpretrain', forms, image))


@pytest.mark.parametrize('scope', TOOLBOXES)
def test_two_processes(scope, short_config, run_python, tmp_path):
    """Gloo, every parameter with a gradient: none has to be looked for."""
    import_models(scope)
    config = short_config(TOOLBOXES[scope], 'find_unused_parameters = False')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    run_python(
        '-m', 'torch.distributed.run', '--nproc_per_node=2',
        f'--master_port={port}', 'tools/train.py', config,
        '--work-dir', tmp_path, '--launcher', 'pytorch', '--no-validate',
    )  # fmt: skip
    checkpoint = read_checkpoint((tmp_path / 'last_checkpoint').read_text())
    state = checkpoint['state_dict']
    assert all(torch.isfinite(v).all() for v in state.values())
    assert any(key.startswith('backbone.stem.') for key in state)


def test_missing_weights_in_one_line(short_config, tmp_path):
    import subprocess

    import_models('mmdet')
    config = short_config(
        TOOLBOXES['mmdet'],
        "model['backbone'] = dict(init_cfg=dict(checkpoint='no/such.pth'))",
    )
    done = subprocess.run(
        [sys.executable, 'tools/train.py', str(config), '--work-dir', str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no pretrained weights at 'no/such.pth'")
