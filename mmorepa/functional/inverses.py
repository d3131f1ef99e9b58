"""The inverse of a deep linear fold, which is linear in the last of its kernels."""

import torch
from torch import Tensor

from .kernels import compose_deep_linear


def solve_deep_linear(kernel: Tensor, first: Tensor, groups: int = 1) -> Tensor:
    """The ``second`` of ``compose_deep_linear(first, second, groups) = kernel``.

    Each output channel is a linear system of its own: the taps of ``second`` are the
    unknowns, those of ``kernel`` the equations. Of all solutions this is the smallest
    (least squares, in float64), shape (O, M/g, k − j + 1, k − j + 1).

    Args:
        kernel (Tensor): Shape (O, Ig, k, k).
        first (Tensor): Shape (M, Ig, j, j), j < k.
        groups (int): g, the groups of both convs. Defaults to 1.

    Raises:
        ValueError: If there is none, as where M is small.
    """
    kernel, first = kernel.double(), first.double()
    hidden, size = len(first) // groups, kernel.shape[-1] - first.shape[-1] + 1
    weights, unknowns = kernel[0].numel(), hidden * size**2
    if unknowns < weights:  # Before minutes of work.
        raise _too_narrow(hidden, weights, unknowns)
    units = torch.eye(unknowns, dtype=torch.float64, device=kernel.device)
    units = units.view(unknowns, hidden, size, size)
    solutions = []
    for first_of_group, wanted in zip(first.chunk(groups), kernel.chunk(groups)):
        system = compose_deep_linear(first_of_group, units).flatten(1)
        # On the CPU, which alone has a solver that knows the rank.
        inverse = torch.linalg.pinv(system.cpu()).to(system)
        solution = wanted.flatten(1) @ inverse
        error = (solution @ system - wanted.flatten(1)).abs().max()
        if error > 1e-6 * wanted.abs().max():
            rank = int(torch.linalg.matrix_rank(system.cpu()))
            raise _too_narrow(hidden, weights, min(rank, weights - 1))
        solutions.append(solution.view(-1, hidden, size, size))
    return torch.cat(solutions)


def _too_narrow(hidden: int, weights: int, free: int) -> ValueError:
    return ValueError(
        'a deep linear kernel cannot be any kernel if its factors are narrow '
        f'({hidden} channels in a group): of {weights} weights of an output channel, '
        f'{free} can be chosen freely, and all of them with more inner channels '
        '(inner_mult)'
    )
