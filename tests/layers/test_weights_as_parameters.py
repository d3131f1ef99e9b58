"""The weight of a training form, used as the parameter that it is of a plain conv."""

import copy
import io

import pytest
import torch
from helpers import assert_near, trained_like
from torch import nn

from mmorepa import switch_to_deploy
from mmorepa.layers import OREPAConv2d


def training_form(**options):
    return trained_like(OREPAConv2d(4, 6, 3, **options))


WAYS = [
    lambda conv, value: conv.weight.requires_grad_(value),
    lambda conv, value: conv.weight.requires_grad_(requires_grad=value),
    lambda conv, value: setattr(conv.weight, 'requires_grad', value),
    lambda conv, value: [p.requires_grad_(value) for p in [conv.weight, conv.bias]],
]


@pytest.mark.parametrize('freeze', WAYS)
@pytest.mark.parametrize('with_grad', [False, True])
def test_freezing(freeze, with_grad):
    conv = training_form()
    for value in (False, True):
        with torch.set_grad_enabled(with_grad):
            freeze(conv, value)
            assert conv.weight.requires_grad is value
        assert all(p.requires_grad is value for p in conv.branches.parameters())
    freeze(conv, False)
    conv(torch.randn(1, 4, 5, 5)).sum().backward() if conv.bias.requires_grad else None
    assert all(p.grad is None for p in conv.branches.parameters())
    assert not switch_to_deploy(conv).weight.requires_grad


def test_gradients_and_hooks():
    conv = training_form()
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    for use in (
        lambda: conv.weight.register_hook(lambda grad: 0 * grad),
        lambda: conv.weight.register_post_accumulate_grad_hook(lambda p: None),
        lambda: conv.weight.grad,
        lambda: setattr(conv.weight, 'grad', torch.ones(6, 4, 3, 3)),
        lambda: setattr(conv.weight, 'grad', None),
        lambda: setattr(conv.weight, 'no_decay', True),
    ):
        with pytest.raises(TypeError, match=r'is no parameter.* of conv\.branches'):
            use()


def times(conv):
    conv.weight.data *= 0.5


def masked(conv):
    conv.weight.data[:, 0] *= torch.zeros(())


def minus(conv):
    conv.weight.data -= conv.weight.detach() / 3


@pytest.mark.parametrize('write', [times, masked, minus])
def test_augmented_writes(write):
    conv, plain = training_form(), nn.Conv2d(4, 6, 3)
    plain.load_state_dict(switch_to_deploy(copy.deepcopy(conv)).state_dict())
    with torch.no_grad():
        write(conv), write(plain)
    assert_near(conv.weight.detach(), plain.weight, 1e-5)
    with torch.no_grad(), pytest.raises(TypeError, match='is no parameter'):
        conv.weight += 1


def test_copies_are_plain():
    conv = training_form()
    kernel = conv.weight.detach()
    file = io.BytesIO()
    torch.save({'w': conv.weight.data, 'v': conv.weight}, file)
    assert file.tell() < 4000
    file.seek(0)
    found = torch.load(file, weights_only=True)
    copies = [*found.values(), copy.deepcopy(conv.weight), copy.copy(conv.weight.data)]
    for one in copies:
        assert type(one) is torch.Tensor
    with pytest.raises(RuntimeError, match='detach'):
        nn.Parameter(conv.weight)
    copies.append(nn.Parameter(conv.weight.detach().clone()))
    for one in copies:
        assert_near(one, kernel)
        one.data.zero_()
    assert_near(conv.weight.detach(), kernel)
    assert all(p.requires_grad for p in conv.parameters())
