"""Parameter groups for an optimizer, and a warning if an optimizer has no branches."""

import warnings
from collections.abc import Collection
from typing import Any, Optional
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# All branches that were ever folded with a gradient, and the ones among them for which
# no optimizer step was seen yet.
_seen: WeakSet = WeakSet()
_waiting: WeakSet = WeakSet()
_hook: Optional[torch.utils.hooks.RemovableHandle] = None


def param_groups(
    model: nn.Module,
    weight_decay: float = 1e-5,
    no_weight_decay_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups the trained parameters of a model: one with weight decay, one without.

    Use it in place of code that collects the ``weight`` of each module, which would
    miss the branches. It works like timm's ``param_groups_weight_decay``.

    Args:
        model (nn.Module): Any model.
        weight_decay (float): The decay of weights, and of the scales of branches,
            (branches, O), as in the recipes of the papers. Parameters of one dimension,
            such as biases, get none. Defaults to 1e-5.
        no_weight_decay_list (Collection[str]): Names of other parameters without decay.

    Examples:
        >>> optimizer = SGD(mmorepa.param_groups(model, 5e-4), lr=0.01, momentum=0.9)
    """
    decayed, not_decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = parameter.dim() < 2 or name in no_weight_decay_list
            (not_decayed if is_exempt else decayed).append(parameter)
    return [
        dict(params=not_decayed, weight_decay=0.0),
        dict(params=decayed, weight_decay=weight_decay),
    ]


def warn_if_not_optimized(branches: nn.Module) -> None:
    """Warns at the next optimizer step if that optimizer has no branch of any conv."""
    global _hook
    if branches in _seen:
        return
    _seen.add(branches)
    _waiting.add(branches)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_check)


def _check(optimizer: torch.optim.Optimizer, *args) -> None:
    global _hook
    trained = {
        branches: list(branches.parameters())
        for branches in _waiting
        if any(p.grad is not None for p in branches.parameters())
    }
    if not trained:
        return
    _waiting.difference_update(trained)
    if not _waiting and _hook is not None:
        _hook.remove()
        _hook = None
    known = {id(p) for group in optimizer.param_groups for p in group['params']}
    # An optimizer with some of the branches does not need a warning: a user chose them.
    if not any(id(p) in known for parameters in trained.values() for p in parameters):
        warnings.warn(
            f'{len(trained)} re-parameterised convs have gradients, and the optimizer '
            'has no parameter of any of their branches: give it '
            "mmorepa.param_groups(model, weight_decay) where it was made of modules' "
            'weights, or freeze the convs (requires_grad_(False)) if that is meant',
            stacklevel=3,
        )
