"""Outputs of the published networks, with weights made up from their key names."""

import pytest
import torch
from golden_networks import NAMES, golden_input, golden_outputs, golden_state
from helpers import assert_near, deployed_twin
from mmengine.registry import MODELS

from mmorepa.converters import from_published


@pytest.mark.parametrize('form', ['training', 'switched', 'loaded'])
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_outputs(name, form):
    result = from_published(golden_state(name))
    state = result['state_dict']
    weight, bias = state.pop('head.fc.weight'), state.pop('head.fc.bias')
    backbone = dict(result['meta']['backbone'], out_indices=(0, 1, 2, 3))
    net = MODELS.build(dict(backbone, deploy=form == 'loaded')).eval()
    state = {key.removeprefix('backbone.'): value for key, value in state.items()}
    net.load_state_dict(state, strict=True)
    if form == 'switched':
        net = deployed_twin(net)
    outputs = net(golden_input())
    logits = outputs[-1].mean((2, 3)) @ weight.T + bias
    assert_near([*outputs, logits], golden_outputs(name), 1e-4)
