import re

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


def printed(text):
    """Parameters and GFLOPs by form."""
    rows = re.findall(r'^(training form|deployed) +([\d,]+) +([\d.]+) ', text, re.M)
    return {form: (int(n.replace(',', '')), float(flops)) for form, n, flops in rows}


def test_both_forms(capsys):
    """The training form costs what its convs cost, however many branches it has."""
    config = DIGITS / 'resnet18-slim-orepa_1xb64_digits.py'
    run_here(FLOPS, config, '--shape', '32')
    text = capsys.readouterr().out
    assert 'One image of 32x32' in text
    figures = printed(text)
    (before, before_flops), (after, after_flops) = figures.values()
    assert after_flops < before_flops < 1.05 * after_flops
    model = build_model(Config.fromfile(config))
    assert before == sum(p.numel() for p in model.parameters())
    assert after < before / 2


def test_detector(capsys):
    import_models('mmdet')
    config = DIGITS / 'faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py'
    run_here(FLOPS, config, '--shape', '64')
    text = capsys.readouterr().out
    assert printed(text).keys() == {'training form', 'deployed'}
    assert '84 boxes' in text
