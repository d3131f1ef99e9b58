"""Inverses of folds: the weights of one branch that make the fold a given kernel.

Each fold is linear in one of its weights, the others being as they are.
"""

import torch
from torch import Tensor

from .kernels import compose_deep_linear


def solve_scaled_sum(kernel: Tensor, rest: Tensor, scale: Tensor) -> Tensor:
    """The term ``X`` of ``kernel[o] = scale[o] · X[o] + rest[o]``.

    Args:
        kernel (Tensor): The wanted sum, shape (O, Ig, k, k).
        rest (Tensor): All other terms, scaled, shape (O, Ig, k, k).
        scale (Tensor): The scale of the term, shape (O,).

    Returns:
        Tensor: Shape (O, Ig, k, k), in float64.

    Raises:
        ValueError: If a scale is zero.
    """
    zeros = (scale == 0).nonzero().flatten().tolist()
    if zeros:
        raise ValueError(
            f'the scale of the branch is zero in {len(zeros)} of {len(scale)} output '
            f'channels (the first is {zeros[0]}), so that nothing that it holds '
            "reaches the kernel; start='quiet' sets the scales"
        )
    return (kernel.double() - rest.double()) / scale.double()[:, None, None, None]


def solve_deep_linear(kernel: Tensor, first: Tensor, groups: int = 1) -> Tensor:
    """The ``second`` of ``compose_deep_linear(first, second, groups) = kernel``.

    Each output channel is a linear system of its own: the taps of ``second`` are the
    unknowns, those of ``kernel`` the equations. Of all solutions this is the smallest
    (least squares, in float64).

    Args:
        kernel (Tensor): Shape (O, Ig, k, k).
        first (Tensor): Shape (M, Ig, j, j), j < k.
        groups (int): g, the groups of both convs. Defaults to 1.

    Returns:
        Tensor: Shape (O, M/g, k − j + 1, k − j + 1), in float64.

    Raises:
        ValueError: If there is none, as where M is small: the system has fewer
            independent columns than equations.
    """
    kernel, first = kernel.double(), first.double()
    hidden, size = len(first) // groups, kernel.shape[-1] - first.shape[-1] + 1
    unknowns = hidden * size**2
    units = torch.eye(unknowns, dtype=torch.float64, device=kernel.device)
    units = units.view(unknowns, hidden, size, size)
    found = []
    for own, wanted in zip(first.chunk(groups), kernel.chunk(groups)):
        system = compose_deep_linear(own, units).flatten(1)
        # On the CPU, which alone has a solver that knows the rank.
        inverse = torch.linalg.pinv(system.cpu()).to(system)
        solution = wanted.flatten(1) @ inverse
        error = (solution @ system - wanted.flatten(1)).abs().max()
        if error > 1e-6 * wanted.abs().max():
            rank = int(torch.linalg.matrix_rank(system.cpu()))
            check_is_wide(kernel, hidden, min(rank, kernel[0].numel() - 1))
        found.append(solution.view(-1, hidden, size, size))
    return torch.cat(found)


def check_is_wide(kernel: Tensor, hidden: int, free: int) -> None:
    """Raises a ValueError if a deep linear kernel cannot be this one.

    Args:
        kernel (Tensor): Shape (O, Ig, k, k).
        hidden (int): The inner channels of a group.
        free (int): The weights of an output channel that can be chosen freely: no more
            than 9 for each inner channel.
    """
    weights = kernel[0].numel()
    if free < weights:
        raise ValueError(
            'a deep linear kernel cannot be any kernel if its factors are narrow '
            f'({hidden} channels in a group): of {weights} weights of an output '
            f'channel, {free} can be chosen freely, and all of them with more inner '
            'channels (inner_mult)'
        )
