"""Random interleavings of all that people do to a conv: no output is ever out of date.

For a longer run, set MMOREPA_INTERLEAVINGS=10000 in the environment.
"""

import copy
import io
import os
import random

import pytest
import torch
from helpers import assert_near, trained_like
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

import mmorepa
from mmorepa.layers import (
    DBBConv2d,
    DeepLinearConv2d,
    OREPAConv2d,
    OREPARepVGGConv2d,
    held,
)

COUNT = int(os.environ.get('MMOREPA_INTERLEAVINGS', 150))
LENGTH = 8
BN = dict(type='BN')
KINDS = {
    '3x3': lambda: OREPAConv2d(4, 6, 3, padding=1, norm_cfg=BN),
    '1x1': lambda: OREPAConv2d(4, 6, 1, norm_cfg=BN, act_cfg=dict(type='ReLU')),
    'no_norm': lambda: OREPAConv2d(4, 6, 3, padding=1),
    'grouped': lambda: OREPAConv2d(4, 6, 3, padding=1, groups=2, norm_cfg=BN),
    '7x7': lambda: OREPAConv2d(2, 3, 7, padding=3, norm_cfg=BN),
    'deep_linear': lambda: DeepLinearConv2d(2, 3, 5, padding=2, norm_cfg=BN),
    'dbb': lambda: DBBConv2d(4, 6, 3, padding=1),
    'orepa_repvgg': lambda: OREPARepVGGConv2d(4, 4, 3, padding=1),
}


class Broken(Exception):
    """What a step may raise."""


class Play:
    """One conv, what is done to it, and what it has to return."""

    def __init__(self, kind: str, dice: random.Random) -> None:
        self.dice, self.build = dice, KINDS[kind]
        self.conv = trained_like(self.build())
        self.done: list[str] = []

    def image(self) -> torch.Tensor:
        return torch.randn(2, self.conv.in_channels, 5, 5)

    def parameter(self) -> nn.Parameter:
        return self.dice.choice(list(self.conv.parameters()))

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The output of a new conv that has only the same numbers."""
        twin = self.build()
        twin.load_state_dict(
            {k: v.detach().clone() for k, v in self.conv.state_dict().items()}
        )
        for one, other in zip(twin.modules(), self.conv.modules()):
            one.training = other.training
            for name in ('eps', 'track_running_stats'):
                if isinstance(one, nn.BatchNorm2d):
                    setattr(one, name, getattr(other, name))
        with torch.no_grad():
            return twin(x)

    def check(self) -> None:
        x = self.image()
        expected = self.reference(x)
        mode = self.dice.choice(
            [torch.no_grad, torch.enable_grad, torch.inference_mode]
        )
        with mode():
            # Statistics must not move, and may not be looked at, by a check.
            kept = copy.deepcopy(self.conv.state_dict())
            found = self.conv(x.clone()).clone()
        with torch.no_grad():
            for key, value in self.conv.state_dict().items():
                value.data.copy_(kept[key])
        try:
            assert_near(found.detach(), expected, 1e-9)
        except AssertionError as error:
            raise AssertionError(f'{error} after {self.done}') from None

    def step(self) -> None:
        name = self.dice.choice(sorted(n for n in dir(self) if n.startswith('do_')))
        self.done.append(name)
        getattr(self, name)()
        self.check()

    # What people do

    def do_train(self) -> None:
        self.conv.train()

    def do_eval(self) -> None:
        self.conv.eval()

    def do_norm_mode(self) -> None:
        for module in self.conv.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(self.dice.random() < 0.5)

    def do_write_one_element(self) -> None:
        data = self.parameter().data
        data[tuple(self.dice.randrange(n) for n in data.shape)] += 0.5

    def do_clamp(self) -> None:
        with torch.no_grad():
            self.parameter().clamp_(-0.6, 0.9)

    def do_mask(self) -> None:
        data = self.parameter().data
        data.mul_((torch.rand_like(data) > 0.2).to(data))

    def do_exchange_data(self) -> None:
        parameter = self.parameter()
        parameter.data = parameter.data * 1.1

    def do_exchange_parameter(self) -> None:
        places = [
            (module, name)
            for module in self.conv.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        module, name = self.dice.choice(places)
        setattr(module, name, nn.Parameter(getattr(module, name).detach() * 0.9))

    def do_load(self) -> None:
        state = {k: v * 1 for k, v in trained_like(self.build()).state_dict().items()}
        self.conv.load_state_dict(state, assign=self.dice.random() < 0.3)

    def do_optimize(self) -> None:
        trained = [p for p in self.conv.parameters() if p.requires_grad]
        if not trained:
            return
        kind = self.dice.choice([torch.optim.SGD, torch.optim.AdamW])
        optimizer = kind(trained, lr=1e-2, fused=self.dice.random() < 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            self.conv(self.image()).square().mean().backward()
            optimizer.step()

    def do_optimize_held(self) -> None:
        trained = [p for p in self.conv.parameters() if p.requires_grad]
        if not trained:
            return
        optimizer = torch.optim.SGD(trained, lr=1e-2, fused=self.dice.random() < 0.5)
        with held(self.conv):
            loss = self.conv(self.image()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def do_break_a_step(self) -> None:
        with pytest.raises(Broken), held(self.conv):
            self.conv(self.image())
            raise Broken

    def do_break_a_block(self) -> None:
        with pytest.raises(Broken), mmorepa.folded(self.conv), torch.no_grad():
            self.conv(self.image())
            raise Broken

    def do_fold(self) -> None:
        with mmorepa.folded(self.conv):
            for _ in range(2):
                self.check()

    def do_write_in_a_block(self) -> None:
        with mmorepa.folded(self.conv), torch.no_grad():
            self.conv.eval()(self.image())
            self.do_write_one_element()

    def do_copy(self) -> None:
        self.conv = copy.deepcopy(self.conv)

    def do_pickle(self) -> None:
        file = io.BytesIO()
        torch.save(self.conv, file)
        file.seek(0)
        self.conv = torch.load(file, weights_only=False)

    def do_convert(self) -> None:
        self.conv.float().double()

    def do_half(self) -> None:
        self.conv.to(torch.bfloat16).double()

    def do_channels_last(self) -> None:
        self.conv.to(memory_format=torch.channels_last)

    def do_freeze(self) -> None:
        self.parameter().requires_grad_(self.dice.random() < 0.5)

    def do_swap_averages(self) -> None:
        """As MMEngine's EMAHook: swap in, evaluate, swap back."""
        other = trained_like(self.build(), self.dice.randrange(99))
        for _ in range(2):
            for name, one in self.conv.named_parameters():
                average = other.get_parameter(name)
                kept = one.data.clone()
                one.data.copy_(average.data)
                average.data.copy_(kept)
            self.check()

    def do_follow_a_student(self) -> None:
        student = trained_like(self.build(), self.dice.randrange(99))
        for name, mine in self.conv.named_parameters():
            mine.data.lerp_(student.get_parameter(name).data, 0.1)

    def do_functional_call(self) -> None:
        others = {n: p * 0.9 for n, p in self.conv.named_parameters()}
        with torch.no_grad():
            functional_call(self.conv, others, (self.image(),))

    def do_prune(self) -> None:
        owners = [m for m in self.conv.modules() if 'weight_origin' in m._parameters]
        if not owners:
            return
        owner = self.dice.choice(owners)
        # It takes views of the parameter.
        owner.weight_origin.data = owner.weight_origin.data.contiguous()
        prune.random_unstructured(owner, 'weight_origin', amount=0.5)
        with torch.no_grad():
            before = self.conv(self.image())
        assert torch.isfinite(before).all()
        prune.remove(owner, 'weight_origin')

    def do_exchange_branches(self) -> None:
        self.conv.branches = trained_like(self.build(), 5).branches

    def do_change_the_norm(self) -> None:
        for module in self.conv.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = self.dice.choice([1e-5, 1e-3])

    def do_write_statistics(self) -> None:
        for module in self.conv.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.data[0] += 0.5


@pytest.mark.parametrize('kind', KINDS)
def test_no_output_is_out_of_date(kind, float64):
    for seed in range(-(-COUNT // len(KINDS))):
        play = Play(kind, random.Random(f'{kind}{seed}'))
        torch.manual_seed(seed)
        for _ in range(LENGTH):
            play.step()
