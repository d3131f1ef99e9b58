import pytest
from helpers import import_models
from mmengine.config import Config
from tool_runs import ROOT, run_here

from mmorepa.runs import build_model

FLOPS = 'analysis_tools/get_flops.py'
DIGITS = ROOT / 'configs/digits'


@pytest.fixture(autouse=True)
def mmpretrain():
    import_models('mmpretrain')


def test_both_forms(capsys):
    """The training form costs what its convs cost, however many branches it has."""
    config = DIGITS / 'resnet18-slim-orepa_1xb64_digits.py'
    figures = run_here(FLOPS, config, '--shape', '32')
    before, after = figures['training form'], figures['deployed']
    assert after['gflops'] < before['gflops'] < 1.05 * after['gflops']
    model = build_model(Config.fromfile(config))
    assert before['params'] == sum(p.numel() for p in model.parameters())
    assert after['params'] < before['params'] / 2
    text = capsys.readouterr().out
    assert 'One image of 32x32' in text and f'{after["params"]:,}' in text


def test_detector(capsys):
    import_models('mmdet')
    config = DIGITS / 'faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py'
    figures = run_here(FLOPS, config, '--shape', '64')
    assert set(figures) == {'training form', 'deployed'}
    assert '84 boxes' in capsys.readouterr().out
