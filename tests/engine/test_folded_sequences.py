"""Folded training equals online folding, whatever happens between and inside of steps.

For a longer run, set MMOREPA_SEQUENCES=2000 in the environment.
"""

import copy
import os
import random

import pytest
import torch
from helpers import trained_like
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmorepa
from mmorepa.layers import DBBConv2d, OREPAConv2d, OREPARepVGGConv2d

COUNT = int(os.environ.get('MMOREPA_SEQUENCES', 20))
LENGTH = 7
CLOSE = dict(rtol=1e-7, atol=1e-9)
BN = dict(type='BN', momentum=0.1)


class Broken(Exception):
    """What a step may raise."""


class Network(BaseModel):
    """Convs of one shape and others; one used twice, one checkpointed, one unused."""

    def __init__(self) -> None:
        super().__init__()
        act = dict(type='ReLU', inplace=False)
        self.stem = OREPAConv2d(2, 4, 7, padding=3, norm_cfg=BN, act_cfg=act)
        self.a = OREPAConv2d(4, 4, 3, padding=1, norm_cfg=BN, act_cfg=act)
        self.b = OREPAConv2d(4, 4, 3, padding=1, norm_cfg=BN, act_cfg=act)
        self.grouped = OREPAConv2d(4, 4, 3, padding=1, groups=2, norm_cfg=BN)
        self.dbb = DBBConv2d(4, 4, 3, padding=1, norm_cfg=BN)
        self.repvgg = OREPARepVGGConv2d(4, 4, 3, padding=1, norm_cfg=BN)
        self.pointwise = OREPAConv2d(4, 3, 1)
        self.unused = OREPAConv2d(4, 4, 3, padding=1)
        self.uses_all = False
        self.breaks = False

    def forward(self, x, mode='tensor'):
        x = self.a(self.stem(x))
        x = x + self.grouped(self.b(x)) + self.dbb(x)
        x = checkpoint(self.repvgg, x, use_reentrant=False)
        if self.uses_all:
            x = x + self.unused(x)
        y = self.pointwise(x) + self.pointwise(x.relu())
        if self.breaks:
            raise Broken
        return dict(loss=y.square().mean()) if mode == 'loss' else y


class Twins:
    """Two equal models, the one trained online and the other folded."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        dice = random.Random(seed)
        online = trained_like(Network(), seed)
        self.models = [online, copy.deepcopy(online)]
        optimizer = dice.choice(
            [
                dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-2),
                dict(type='SGD', lr=0.02, fused=True),
                dict(type='AdamW', lr=1e-3, weight_decay=1e-2),
            ]
        )
        options = dict(
            optimizer=optimizer,
            accumulative_counts=dice.choice([1, 1, 2, 3]),
            clip_grad=dice.choice([None, dict(max_norm=0.5)]),
        )
        self.wrappers = [
            build_optim_wrapper(model, dict(type=kind, **copy.deepcopy(options)))
            for model, kind in zip(self.models, ('OptimWrapper', 'FoldedOptimWrapper'))
        ]
        self.others = [copy.deepcopy(m) for m in self.models]
        self.done: list[str] = []

    def play(self, name: str, number: int) -> None:
        """Does one thing to both, with the same dice."""
        self.done.append(name)
        results = []
        for model, other, wrapper in zip(self.models, self.others, self.wrappers):
            self.dice = random.Random(self.seed * 1000 + number)
            torch.manual_seed(self.seed * 1000 + number)
            results.append(getattr(self, name)(model, other, wrapper))
        self.compare(results)

    def compare(self, results: list) -> None:
        try:
            if results[0] is not None:
                torch.testing.assert_close(results[1], results[0], **CLOSE)
            for (name, one), (_, other) in zip(
                *(m.named_parameters() for m in self.models)
            ):
                torch.testing.assert_close(other.data, one.data, msg=name, **CLOSE)
                assert (other.grad is None) == (one.grad is None), name
                if one.grad is not None:
                    torch.testing.assert_close(other.grad, one.grad, msg=name, **CLOSE)
            for one, other in zip(*(m.buffers() for m in self.models)):
                torch.testing.assert_close(other, one, **CLOSE)
        except AssertionError as error:
            raise AssertionError(f'{error} after {self.done}') from None

    def image(self):
        return torch.randn(2, 2, 6, 6)

    def parameter(self, model):
        return self.dice.choice(list(model.parameters()))

    # What happens. The same is done to both, so that each takes model, other, wrapper.

    def do_step(self, model, other, wrapper):
        with wrapper.optim_context(model):
            loss = model(self.image(), mode='loss')['loss']
        wrapper.update_params(loss)
        return loss.detach()

    do_another_step = do_one_more_step = do_step

    def do_two_forwards(self, model, other, wrapper):
        with wrapper.optim_context(model):
            first = model(self.image(), mode='loss')['loss']
        with wrapper.optim_context(model):
            second = model(self.image(), mode='loss')['loss']
        wrapper.update_params(first + second)

    def do_two_backwards(self, model, other, wrapper):
        with wrapper.optim_context(model):
            loss = model(self.image(), mode='loss')['loss']
        wrapper.backward(loss, retain_graph=True)
        wrapper.update_params(loss)

    def do_backward_inside(self, model, other, wrapper):
        with wrapper.optim_context(model):
            loss = model(self.image(), mode='loss')['loss']
            wrapper.update_params(loss)

    def do_nested(self, model, other, wrapper):
        with wrapper.optim_context(model), wrapper.optim_context(model.a):
            loss = model(self.image(), mode='loss')['loss']
            with wrapper.optim_context(model):
                loss = loss + model(self.image(), mode='loss')['loss']
        wrapper.update_params(loss)

    def do_other_model(self, model, other, wrapper):
        """A second model in the same loss, as of a distillation both ways."""
        with wrapper.optim_context(other):
            loss = other(self.image(), mode='loss')['loss']
        with wrapper.optim_context(model):
            loss = loss + model(self.image(), mode='loss')['loss']
        wrapper.update_params(loss)
        return [p.grad for p in other.parameters()][:5]

    def do_teacher(self, model, other, wrapper):
        with wrapper.optim_context(model):
            for teacher, student in zip(other.parameters(), model.parameters()):
                teacher.data.lerp_(student.data, 0.1)
            x = self.image()
            with torch.no_grad():
                target = other.eval()(x)
            loss = (model(x) - target).square().mean()
        wrapper.update_params(loss)
        other.train()
        return target

    def do_by_hand(self, model, other, wrapper):
        model(self.image(), mode='loss')['loss'].backward()
        wrapper.optimizer.step()
        wrapper.optimizer.zero_grad()

    def do_by_hand_after_a_context(self, model, other, wrapper):
        with wrapper.optim_context(model):
            loss = model(self.image(), mode='loss')['loss']
        loss.backward()
        wrapper.optimizer.step()
        wrapper.optimizer.zero_grad()

    def do_plain_backward_after_a_context(self, model, other, wrapper):
        with wrapper.optim_context(model):
            model(self.image(), mode='loss')
        model(self.image(), mode='loss')['loss'].backward()

    def do_break_forward(self, model, other, wrapper):
        model.breaks = True
        with pytest.raises(Broken), wrapper.optim_context(model):
            model(self.image(), mode='loss')
        model.breaks = False

    def do_break_backward(self, model, other, wrapper):
        def stop(grad):
            raise Broken

        with wrapper.optim_context(model):
            x = self.image().requires_grad_()
            x.register_hook(stop)
            loss = model(x, mode='loss')['loss']
        with pytest.raises(Broken):
            wrapper.backward(loss)
        # What is half done is not the same, and nobody goes on with it.
        model.zero_grad()

    def do_clear(self, model, other, wrapper):
        model.zero_grad()

    def do_evaluate(self, model, other, wrapper):
        with torch.no_grad():
            plain = model.eval()(self.image())
            with mmorepa.folded(model):
                found = model(self.image())
        model.train()
        return plain, found

    def do_norm_eval(self, model, other, wrapper):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def do_write(self, model, other, wrapper):
        data = self.parameter(model).data
        data[tuple(self.dice.randrange(n) for n in data.shape)] += 0.1

    def do_prune(self, model, other, wrapper):
        data = self.parameter(model).data
        data.mul_((torch.rand_like(data) > 0.2).to(data))

    def do_freeze(self, model, other, wrapper):
        conv = self.dice.choice([model.a, model.b, model.pointwise, model.repvgg])
        conv.requires_grad_(self.dice.random() < 0.5)

    def do_freeze_a_part(self, model, other, wrapper):
        self.parameter(model).requires_grad_(self.dice.random() < 0.5)

    def do_load(self, model, other, wrapper):
        model.load_state_dict(trained_like(Network(), 7).state_dict())

    def do_second_loss(self, model, other, wrapper):
        with wrapper.optim_context(model):
            loss = model(self.image(), mode='loss')['loss']
            loss = loss + 0.1 * model.a.branches.scale.square().sum()
            loss = loss + 0.1 * model.b.regularized_kernel().square().sum()
        wrapper.update_params(loss)

    def do_penalty(self, model, other, wrapper):
        with wrapper.optim_context(model):
            x = self.image().requires_grad_()
            loss = model.pointwise(model.a.convolve(model.stem.convolve(x))).sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        wrapper.update_params(grad.square().mean())

    def do_gradient_hooks(self, model, other, wrapper):
        calls = []
        for one in (model.a.branches.scale, model.b.branches.weight_origin):
            one.requires_grad_(True)
        handles = [
            model.a.branches.scale.register_hook(lambda g: calls.append(0) or g * 0.5),
            model.b.branches.weight_origin.register_post_accumulate_grad_hook(
                lambda p: calls.append(1)
            ),
        ]
        self.do_step(model, other, wrapper)
        for handle in handles:
            handle.remove()
        return torch.tensor(sorted(calls))

    def do_use_all(self, model, other, wrapper):
        model.uses_all = self.dice.random() < 0.5

    def do_exchange(self, model, other, wrapper):
        model.a.branches, model.b.branches = model.b.branches, model.a.branches

    def do_channels_last(self, model, other, wrapper):
        model.to(memory_format=torch.channels_last)


NAMES = sorted(name for name in dir(Twins) if name.startswith('do_'))


def test_equals_online_folding(float64):
    for seed in range(COUNT):
        twins, dice = Twins(seed), random.Random(seed)
        for number in range(LENGTH):
            name = 'do_step' if number % 2 else dice.choice(NAMES)
            twins.play(name, number)


@pytest.mark.parametrize('name', NAMES)
def test_each_on_its_own(name, float64):
    twins = Twins(3)
    for number, each in enumerate(['do_step', name, 'do_step', name, 'do_step']):
        twins.play(each, number)
