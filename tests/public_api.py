"""A program on the public interface, for the type checker alone."""

from typing import Optional

import torch
from mmengine.config import Config
from torch import nn

import mmorepa
from mmorepa import functional


def build(network: nn.Module) -> nn.Module:
    model: nn.Module = mmorepa.add_branches(network)
    groups: list[dict] = mmorepa.param_groups(model, weight_decay=0.01)
    torch.optim.SGD(groups, lr=0.1)
    with mmorepa.folded(model), torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    switchable: bool = mmorepa.is_switchable(model)
    return mmorepa.switch_to_deploy(model) if switchable else model


def read(name: str, options: Optional[dict] = None) -> Config:
    names: list[str] = mmorepa.list_configs('imagenet/*')
    return mmorepa.get_config(names[0] if name not in names else name, options)


def fold(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    composed: torch.Tensor = functional.compose_1x1_kxk(outer, inner)
    return composed + functional.embed_1x1(inner, 3)
