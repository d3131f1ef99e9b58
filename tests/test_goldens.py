"""Outputs of the published networks, with weights made up from their key names."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_near, deployed_twin

from mmorepa.backbones import OREPAResNet

GOLDENS = Path(__file__).parents[2] / 'shared' / 'goldens'

pytestmark = pytest.mark.skipif(
    not GOLDENS.is_dir(), reason='no ../shared/goldens beside the repository'
)

# Published name, ours; the longer of two that end alike comes first.
WEIGHTS = {
    'weight_orepa_origin': 'branches.weight_origin',
    'weight_orepa_avg_conv': 'branches.weight_average',
    'weight_orepa_pfir_conv': 'branches.weight_frequency',
    'weight_orepa_1x1_kxk_idconv1': 'branches.weight_pointwise_kxk_1',
    'weight_orepa_1x1_kxk_conv2': 'branches.weight_pointwise_kxk_2',
    'weight_orepa_1x1': 'branches.weight_pointwise',
    'weight_orepa_gconv_dw': 'branches.weight_depthwise',
    'weight_orepa_gconv_pw': 'branches.weight_separable',
    'vector': 'branches.scale',
}
FIXED = ('weight_orepa_avg_avg', 'weight_orepa_prior', 'id_tensor')


def our_key(key):
    """The key of a published ResNet's entry in ours."""
    key = key.replace('stage0.conv1', 'stem').replace('shortcut', 'downsample')
    key = re.sub(r'^stage(\d)', r'layer\1', key).replace('.bn.', '.norm.')
    *path, name = key.split('.')
    if path[-1] == 'conv':
        return '.'.join([*path[:-1], 'branches', name])
    match = re.fullmatch(r'weight(\d)', path[-1])
    if match:
        *path, _ = path
        return '.'.join(
            [*path, 'branches.factors', match[1], WEIGHTS[name].split('.')[1]]
        )
    return '.'.join([*path, WEIGHTS.get(name, name)])


@pytest.fixture(scope='module')
def layout():
    path = GOLDENS / 'official_layout.py'
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def published(layout):
    manifest = json.loads((GOLDENS / 'resnet18-orepa.manifest.json').read_text())
    return layout.build_state_dict(manifest)


@pytest.fixture(scope='module')
def state(published):
    return {
        our_key(key): value
        for key, value in published.items()
        if not key.startswith('linear.') and not key.endswith(FIXED)
    }


@pytest.mark.parametrize('form', ['training', 'switched', 'loaded'])
def test_resnet18(layout, published, state, form):
    net = OREPAResNet(18, deploy=form == 'loaded').eval()
    net.load_state_dict(state, strict=True)
    if form == 'switched':
        net = deployed_twin(net)
    with torch.no_grad():
        *stages, last = net(layout.golden_input())
        logits = last.mean((2, 3)) @ published['linear.weight'].T
        logits += published['linear.bias']

    golden = np.load(GOLDENS / 'resnet18-orepa.npz')
    names = ['stage1', 'stage2', 'stage3', 'stage4', 'logits']
    for name, output in zip(names, [*stages, last, logits]):
        assert_near(output, torch.from_numpy(golden[name]), 1e-4)
