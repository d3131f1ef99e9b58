"""Modules whose kernels are folds of :mod:`mmorepa.functional`."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Optional

import torch
import torch.fx
from torch import Tensor, nn

from ..functional import BranchSum, fold_kernel
from .starting import parameter_of

# A symbolic trace shows the fold as one node: a call with the branches as arguments.
torch.fx.wrap('fold_kernel')

# The roles that have a row for each output channel: one for each branch but origin.
_ROWS = ('average', 'frequency', 'pointwise', 'second', 'separable')


class BranchKernel(nn.Module):
    """A kernel that is a :class:`mmorepa.functional.BranchSum` of its parameters.

    A subclass adds a parameter for each name in the sum's ``roles``, the scale last.
    """

    # The keys are all known branches, in the order of the rows of ``scale``.
    INITIAL_SCALES: dict[str, float]

    def __init__(
        self, shape: tuple[int, ...], groups: int, branches: Optional[Sequence[str]]
    ) -> None:
        super().__init__()
        self.branch_names = choose_branches(self.INITIAL_SCALES, branches)
        self.branch_sum = BranchSum(self.branch_names, shape, groups)

    def add_scale(self, initial_scales: Optional[dict[str, float]]) -> None:
        """Adds the linear scaling layers, shape (branches, O)."""
        check_branches(self.INITIAL_SCALES, initial_scales or {})
        scales = {**self.INITIAL_SCALES, **(initial_scales or {})}
        chosen = torch.tensor([scales[name] for name in self.branch_names])
        outputs = self.branch_sum.shape[0]
        self.scale = nn.Parameter(chosen[:, None].repeat(1, outputs))

    def forward(self) -> Tensor:
        """Returns the kernel, shape (O, Ig, k, k)."""
        return fold_kernel(self.branch_sum, *self.tensors())

    def tensors(self) -> list[Tensor]:
        """The parameters, in the order of :attr:`branch_sum`'s roles."""
        return [getattr(self, name) for name in self.branch_sum.roles]

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor, scale: float = 1.0) -> None:
        """Makes ``origin`` the kernel, and scales every other branch by zero.

        The other branches are made small, so that the first step is like that of a
        plain conv: ``Σ_b |K_b|²`` is at most ``√D / 6`` in each output channel, with
        ``D = Ig·k²``, see docs/mathematics.md.

        Args:
            kernel (Tensor): Shape (O, Ig, k, k).
            scale (float): The scale of ``origin``. Defaults to one.
        """
        if 'origin' not in self.branch_names:
            raise ValueError(
                "only the branch 'origin' can make up for the others, and there are "
                f'only {", ".join(self.branch_names)}'
            )
        origin = parameter_of(self, 'weight_origin')
        named = {name: getattr(self, name).double() for name in self.branch_sum.roles}
        kernels = self.branch_sum.branch_kernels(*named.values())
        other_kernels = [k for name, k in kernels.items() if name != 'origin']
        if not all(kernel.isfinite().all() for kernel in other_kernels):
            raise ValueError(
                'the other branches have weights that are not finite, or were never '
                'written (to_empty)'
            )
        self.scale.zero_()
        self.scale[self.branch_names.index('origin')] = scale
        stored = self.branch_sum.as_stored('weight_origin', kernel.double() / scale)
        origin.copy_(stored.view_as(origin))
        if not other_kernels:
            return
        power = sum(k.square().flatten(1).sum(dim=1) for k in other_kernels)
        limit = math.sqrt(math.prod(self.branch_sum.shape[1:])) / 6
        factor = (limit / power).sqrt().clamp(max=1)
        for name, role in self.branch_sum.roles.items():
            if role in _ROWS and self._parameters.get(name) is not None:
                weight = self._parameters[name]
                weight.mul_(factor.to(weight).view(-1, *[1] * (weight.dim() - 1)))

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Multiplies the kernel by a factor, shape (O,), for each output channel."""
        self.scale.mul_(factor)


def choose_branches(
    known: Collection[str], names: Optional[Sequence[str]]
) -> tuple[str, ...]:
    """The chosen branches, all if ``names`` is None, in their fixed order."""
    check_branches(known, names or ())
    if names is not None and not names:
        raise ValueError(
            f'no branch is left; choose at least one of {", ".join(known)}'
        )
    return tuple(name for name in known if names is None or name in names)


def check_branches(known: Collection[str], names: Iterable[str]) -> None:
    """Raises a ValueError if a name is not known."""
    for name in names:
        if name not in known:
            raise ValueError(
                f'unknown branch {name!r}; the branches are {", ".join(known)}'
            )
