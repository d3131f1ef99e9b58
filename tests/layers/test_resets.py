"""Training forms that start again from fresh parameters."""

import copy

import pytest
import torch
from helpers import trained_like
from torch import nn
from torch.nn.utils import prune

from mmorepa.layers import (
    DBBConv2d,
    DeepLinearConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    PlainConv2d,
    RepVGGConv2d,
)

BN = dict(type='BN')
WITH_NORMS = [DBBConv2d, RepVGGConv2d, OREPARepVGGConv2d]
KINDS = [OREPAConv2d, PlainConv2d, DeepLinearConv2d, *WITH_NORMS]


def kernel_of(conv):
    return conv.equivalent_kernel_bias()[0].flatten()


def cosine(one, other):
    return torch.cosine_similarity(one, other, dim=0).abs().item()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('options', [dict(bias=False), dict(norm_cfg=BN), dict()])
@pytest.mark.parametrize('size', [1, 3])
def test_reset_parameters(kind, options, size):
    conv = kind(16, 24, size, padding=size // 2, **options)
    ids = [id(p) for p in conv.parameters()]
    fresh = copy.deepcopy(conv.state_dict())
    trained = kernel_of(trained_like(conv))
    conv.reset_parameters()
    assert [id(p) for p in conv.parameters()] == ids
    assert cosine(trained, kernel_of(conv)) < 0.15
    # Nothing of the training is left, in what it does not draw.
    for name, value in conv.state_dict().items():
        if fresh[name].float().std() == 0 or fresh[name].numel() == 1:
            assert torch.equal(value, fresh[name]), name
        elif name != 'branches.identity':
            assert value.std().item() == pytest.approx(
                fresh[name].std().item(), rel=0.7
            )
    before = kernel_of(conv)
    conv.reset_parameters()
    assert cosine(before, kernel_of(conv)) < 0.9


RULES = [
    lambda conv: nn.init.kaiming_normal_(conv.weight),
    lambda conv: nn.init.trunc_normal_(conv.weight, std=0.02),
    lambda conv: conv.weight.data.normal_(0, 0.01),
    lambda conv: nn.Conv2d.reset_parameters(conv),
]


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('size', [1, 3, 7])
@pytest.mark.parametrize('options', [dict(bias=False), dict(norm_cfg=BN), dict()])
def test_rules_of_a_trained_conv(rule, size, options):
    conv = OREPAConv2d(3, 16, size, **options)
    trained_like(conv)
    branches = {k: v.clone() for k, v in conv.branches.named_parameters()}
    kernel = kernel_of(conv)
    rule(conv)
    assert cosine(kernel, kernel_of(conv)) < 0.4
    for name, value in conv.branches.named_parameters():
        assert not torch.equal(value, branches[name]), f'{name} is as it was trained'


@pytest.mark.parametrize('train', ['step', 'load', 'data'])
def test_what_counts_as_trained(train):
    conv = OREPAConv2d(4, 6, 3, bias=False)
    fresh = conv.branches.state_dict()['weight_pointwise'].clone()
    RULES[0](conv)
    assert torch.equal(conv.branches.weight_pointwise, fresh), 'it passes a fresh one'
    if train == 'step':
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        conv(torch.randn(1, 4, 5, 5)).square().sum().backward()
        optimizer.step()
    elif train == 'load':
        conv.load_state_dict(OREPAConv2d(4, 6, 3, bias=False).state_dict())
    else:  # Its version counts nothing.
        conv.branches.weight_pointwise.data.add_(1)
    before = conv.branches.weight_pointwise.clone()
    RULES[0](conv)
    assert cosine(before.flatten(), conv.branches.weight_pointwise.flatten()) < 0.9


def test_built_on_meta():
    """As FSDP starts a model."""
    with torch.device('meta'):
        model = nn.Sequential(OREPAConv2d(4, 6, 3), DBBConv2d(6, 6, 3, padding=1))
    model.to_empty(device='cpu')
    for conv in model:
        conv.reset_parameters()
    assert model(torch.randn(2, 4, 9, 9)).std() < 3


def test_pruned():
    conv = OREPAConv2d(4, 6, 3)
    prune.l1_unstructured(conv.branches, 'weight_origin', 0.5)
    with pytest.raises(ValueError, match=r'prune\.remove .* before a reset'):
        conv.reset_parameters()
