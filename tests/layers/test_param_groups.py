"""Parameters of training forms in optimizers of one's own."""

import warnings

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmorepa
from mmorepa.layers import DBBConv2d, OREPAConv2d


def network(kind=OREPAConv2d):
    convs = [kind(3, 4, 3, padding=1, bias=False), kind(4, 4, 3, padding=1)]
    return nn.Sequential(convs[0], nn.BatchNorm2d(4), convs[1], nn.Linear(8, 2))


def by_weight(model):
    """As YOLOv5, YOLOv7 and YOLOX do it."""
    found = []
    for module in model.modules():
        for name in ('weight', 'bias'):
            if isinstance(getattr(module, name, None), nn.Parameter):
                found.append(getattr(module, name))
    return found


def steps(model, optimizer, count=2):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize('kind', [OREPAConv2d, DBBConv2d])
def test_groups(kind):
    model = network(kind)
    model[0].requires_grad_(False)
    others, decayed = mmorepa.param_groups(model, 0.01, ['3.weight'])
    assert (others['weight_decay'], decayed['weight_decay']) == (0, 0.01)
    ids = [id(p) for group in (others, decayed) for p in group['params']]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(ids) == sorted(trained)
    assert all(p.dim() > 1 for p in decayed['params'])
    assert any(p is model[3].weight for p in others['params'])
    assert {p.dim() for p in others['params'] if p is not model[3].weight} == {1}


def test_a_loop_that_misses_the_branches():
    model = network()
    optimizer = torch.optim.SGD(by_weight(model), lr=0.1)
    with pytest.warns(UserWarning, match=r'2 re-param.* mmorepa\.param_groups') as told:
        steps(model, optimizer)
    assert len(told) == 1


def test_folded_training_says_it_too():
    model = network()
    cfg = dict(type='FoldedOptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    wrapper = build_optim_wrapper(model, cfg)
    wrapper.optimizer = torch.optim.SGD(by_weight(model), lr=0.1)
    with pytest.warns(UserWarning, match=r'mmorepa\.param_groups'):
        with wrapper.optim_context(model):
            loss = model(torch.randn(2, 3, 8, 8)).square().mean()
        wrapper.update_params(loss)


def test_what_is_meant():
    """Loops that train the branches, or that freeze them."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = network()
        steps(model, torch.optim.Adam(mmorepa.param_groups(model)))
        model = network()
        model[2].requires_grad_(False)
        steps(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
        model.requires_grad_(False)[3].requires_grad_()
        steps(model, torch.optim.SGD(model[3].parameters(), lr=0.1))
        # A generator is trained while another network runs.
        other = network(DBBConv2d)
        steps(other, torch.optim.SGD(by_weight(other), lr=0.1))
