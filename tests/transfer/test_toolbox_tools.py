"""The toolboxes' own tools and inferencers, with our configs and both forms."""

import pickle

import pytest
import torch
from helpers import assert_near, import_models
from tool_runs import SWITCH, run_here, run_name, run_tool_of, skip_timing

from mmorepa import is_switchable

pytestmark = pytest.mark.slow
TOOLBOXES = {
    'mmdet': 'faster-rcnn_r18-slim-orepa_fpn',
    'mmseg': 'deeplabv3plus_r18-slim-orepa',
}
HOOK = "custom_hooks = [dict(type='SwitchToDeployHook')]"


@pytest.fixture(scope='module', params=TOOLBOXES)
def trained(request, short_config, tmp_path_factory):
    """By the toolbox's own tools/train.py: its configs and checkpoints by form."""
    scope = request.param
    import_models(scope)
    config = short_config(TOOLBOXES[scope])
    folder = tmp_path_factory.mktemp('work')
    options = '--cfg-options', run_name()
    run_tool_of(scope, 'train.py', config, '--work-dir', folder, *options)
    checkpoint = (folder / 'last_checkpoint').read_text()
    deployed = folder / 'deploy.pth'
    with pytest.MonkeyPatch.context() as patch:
        skip_timing(patch)
        run_here(SWITCH, config, checkpoint, deployed)
    deployed_config = folder / 'deploy_config.py'
    return scope, {
        'training form': (config, checkpoint),
        'switched by the hook': (short_config(TOOLBOXES[scope], HOOK), checkpoint),
        'deployed': (deployed_config, deployed),
        'folded while loading': (deployed_config, checkpoint),
    }


def test_own_test_tool(trained, tmp_path):
    """The same predictions of every form."""
    mmcv = pytest.importorskip('mmcv')
    scope, forms = trained
    results = []
    for form in ('training form', 'switched by the hook', 'deployed'):
        out = tmp_path / form.replace(' ', '-')
        line = [*forms[form], '--work-dir', out, '--cfg-options', run_name()]
        line += ['--out', f'{out}.pkl' if scope == 'mmdet' else out]
        run_tool_of(scope, 'test.py', *line)
        if scope == 'mmdet':
            predictions = pickle.loads(out.with_suffix('.pkl').read_bytes())
            results.append([p['pred_instances']['scores'] for p in predictions])
        else:
            files = sorted(out.glob('*.png'))
            maps = [mmcv.imread(str(file), flag='unchanged') for file in files]
            results.append([torch.tensor(labels) for labels in maps])
    expected, *others = results
    assert len(expected) == 3
    for found in others:
        for a, b in zip(found, expected, strict=True):
            if scope == 'mmdet':
                assert_near(a, b, 1e-3)
            else:
                # Pixels whose two best classes are as good as equal.
                assert (a != b).float().mean() < 0.001


def infer(scope, config, checkpoint, image):
    """The network of an inferencer, and scores of its prediction."""
    if scope == 'mmdet':
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(
            str(config), str(checkpoint), device='cpu', show_progress=False
        )
        found = inferencer(image)['predictions'][0]['scores'][:20]
        return inferencer.model, torch.tensor(found)
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(str(config), str(checkpoint), device='cpu')
    sample = inferencer(image, return_datasamples=True)
    return inferencer.model, sample.seg_logits.data


def test_inferencers(trained, scenes_folder):
    scope, forms = trained
    image = str(next(scenes_folder.glob('coco/val2017/*.png')))
    _, expected = infer(scope, *forms['training form'], image)
    assert expected.numel() > 5 and expected.std() > 0
    for form in ('deployed', 'folded while loading'):
        model, found = infer(scope, *forms[form], image)
        assert not is_switchable(model)
        assert_near(found, expected, 1e-3)


def test_predictions_side_by_side(trained, tmp_path):
    mmcv = pytest.importorskip('mmcv')
    _, forms = trained
    config, checkpoint = forms['training form']
    out = tmp_path / 'folder' / 'predictions.png'
    line = [config, checkpoint, forms['deployed'][1], out, '--images=2']
    run_here('analysis_tools/draw_predictions.py', *line, '--score=0.01')
    picture = mmcv.imread(str(out)).astype(float)
    assert picture.std() > 10
    # The last two of three columns are the predictions of either form.
    _, middle, right = (part.mean() for part in _thirds(picture))
    assert abs(middle - right) < 2
    assert [path.name for path in out.parent.iterdir()] == ['predictions.png']


def _thirds(picture):
    width = picture.shape[1]
    return [picture[:, i * width // 3 : (i + 1) * width // 3] for i in range(3)]
