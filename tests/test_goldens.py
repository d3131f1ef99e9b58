"""Outputs of the published networks, with weights made up from their key names."""

import re

import pytest
import torch
from golden_networks import golden_input, golden_outputs, golden_state
from helpers import assert_near, deployed_twin
from published_layout import FIXED

from mmorepa.backbones import OREPARepVGG, OREPAResNet

# What follows 'weight_orepa_' or 'weight_rbr_' in published names, and ours.
WEIGHTS = {
    'origin': 'weight_origin',
    'avg_conv': 'weight_average',
    'pfir_conv': 'weight_frequency',
    '1x1_kxk_idconv1': 'weight_pointwise_kxk_1',
    '1x1_kxk_conv2': 'weight_pointwise_kxk_2',
    '1x1': 'weight_pointwise',
    'gconv_dw': 'weight_depthwise',
    'gconv_pw': 'weight_separable',
}


def entry(name):
    """The name of a parameter within a conv."""
    if name == 'vector':
        return 'branches.scale'
    match = re.fullmatch('weight_(?:orepa|rbr)_(.*)', name)
    return f'branches.{WEIGHTS[match[1]]}' if match else name


def resnet_key(key):
    """The key of a published ResNet's entry in ours."""
    key = key.replace('stage0.conv1', 'stem').replace('shortcut', 'downsample')
    key = re.sub(r'^stage(\d)', r'layer\1', key).replace('.bn.', '.norm.')
    key = key.replace('.conv.weight', '.branches.weight')
    key = re.sub(r'^stem\.weight(\d)', r'stem.branches.factors.\1', key)
    path, name = key.rsplit('.', 1)
    # A factor of the stem is a kernel, not a conv.
    ours = entry(name)
    return f'{path}.{ours.split(".")[-1] if "factors" in path else ours}'


def repvgg_key(key):
    """The key of a published RepVGG's entry in ours."""
    key = re.sub(r'^stage(\d)', r'layer\1', key.replace('stage0', 'stem'))
    key = key.replace('rbr_identity.', 'conv.branches.identity.norm.')
    key = key.replace('rbr_1x1.conv.', 'conv.branches.pointwise.branches.')
    key = key.replace('rbr_1x1.bn.', 'conv.branches.pointwise.norm.')
    key = key.replace('rbr_dense.bn.', 'conv.branches.origin.norm.')
    key = key.replace('rbr_dense.', 'conv.branches.origin.')
    path, name = key.rsplit('.', 1)
    return f'{path}.{entry(name)}'


NETWORKS = {
    'resnet18-orepa': (lambda **kwargs: OREPAResNet(18, **kwargs), resnet_key),
    'repvgg-a0-orepa': (lambda **kwargs: OREPARepVGG('A0', **kwargs), repvgg_key),
}


@pytest.fixture(scope='module', params=NETWORKS)
def published(request):
    """The name of a network, how it is built, and its published state."""
    state = golden_state(request.param)
    build, our_key = NETWORKS[request.param]
    classifier = state.pop('linear.weight'), state.pop('linear.bias')
    ours = {our_key(k): v for k, v in state.items() if not k.endswith(FIXED)}
    for key, value in ours.items():
        if key.endswith('origin.branches.scale'):
            # The published blocks with an identity branch have a row that no
            # branch uses.
            ours[key] = value[:5]
        # Ours have the input channels last.
        taps = value.shape[-1] if value.dim() == 4 else 1
        if taps == 3 and key.endswith(('weight_pointwise_kxk_2', 'weight_origin')):
            ours[key] = value.flatten(2).transpose(1, 2)
        if key.endswith('weight_separable'):
            ours[key] = value.view(len(value), -1, 8).transpose(1, 2)
        if key.endswith('weight_depthwise'):
            ours[key] = value.view(-1, 8, 9).permute(1, 2, 0)
    return request.param, build, ours, classifier


@pytest.mark.parametrize('form', ['training', 'switched', 'loaded'])
def test_outputs(published, form):
    name, build, state, (weight, bias) = published
    net = build(deploy=form == 'loaded').eval()
    net.load_state_dict(state, strict=True)
    if form == 'switched':
        net = deployed_twin(net)
    with torch.no_grad():
        outputs = net(golden_input())
        logits = outputs[-1].mean((2, 3)) @ weight.T + bias
    assert_near([*outputs, logits], golden_outputs(name), 1e-4)
