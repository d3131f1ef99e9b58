"""Finds the changes of users to a training form that deployment has to respect."""

import warnings
from collections.abc import Callable
from typing import Optional

from torch import nn

from .folding import is_fusible


def overridden_fold(conv: nn.Conv2d) -> Optional[str]:
    """``'kernel'`` or ``'convolve'`` if a user has overridden that method of a conv.

    None if not, or if the same class overrides the float64 fold of deployment too.
    """
    exact = {'branches_kernel_bias', 'equivalent_kernel_bias'}
    for name in ('kernel', 'convolve'):
        if name in vars(conv):
            return name
        owner = next(c for c in type(conv).__mro__ if vars(c).keys() & {name, *exact})
        is_ours = owner.__module__.startswith('mmorepa.')
        if not is_ours and not vars(owner).keys() & exact:
            return name
    return None


def check_foldable(conv: nn.Conv2d) -> None:
    """Raises a TypeError if the deployed form would ignore a method of the user.

    Also if the branches have no parameters, whose dtype the deployed form would have.
    """
    name = overridden_fold(conv)
    if name is not None:
        raise TypeError(
            f'{type(conv).__name__} has a {name}() of its own, which the '
            'deployed form does not call: override _conv_forward() or forward(), '
            'which it does, or branches_kernel_bias() too'
        )
    if next(conv.branches.parameters(), None) is None:
        raise TypeError(f'the branches of {type(conv).__name__} have no parameters')


def forward_hooks(module: nn.Module) -> list[Callable]:
    """The hooks of users. Hooks of this package and of weight norms do not count."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    known = ('mmorepa.', 'torch.nn.utils')
    return [hook for hook in hooks if not str(hook.__module__).startswith(known)]


def warn_of_silent_hooks(conv: nn.Conv2d) -> None:
    """Warns of hooks inside of a conv that deployment removes."""
    folded = ('branches', 'norm') if is_fusible(conv.norm) else ('branches',)
    names = [
        name
        for name, module in conv.named_modules()
        if name.startswith(folded) and forward_hooks(module)
    ]
    if names:
        warnings.warn(
            f'hooks on {", ".join(names)} of a {type(conv).__name__} are not '
            'called any more: these modules are folded into the kernel. Put hooks '
            'on the conv itself',
            stacklevel=3,
        )
