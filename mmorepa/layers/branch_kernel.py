"""Kernels that are folds of :mod:`mmorepa.functional`, as modules."""

import math

import torch
import torch.fx
from torch import Tensor, nn

from ..functional import BranchSum, fold_kernel, solve_scaled_sum

# A symbolic trace shows the fold as one node, a function of the branches.
torch.fx.wrap('fold_kernel')


_LAST = ('average', 'frequency', 'pointwise', 'second', 'separable')


class BranchKernel(nn.Module):
    """A kernel that is a :class:`mmorepa.functional.BranchSum` of its parameters.

    A subclass sets :attr:`branch_sum` and has a parameter of each of its names.
    """

    branch_sum: BranchSum
    branch_names: tuple[str, ...]  # Their names, in the order of the rows of ``scale``.

    def forward(self) -> Tensor:
        """Returns the kernel, shape (O, Ig, k, k)."""
        return fold_kernel(self.branch_sum, *self.tensors())

    @property
    def groups(self) -> int:
        """g."""
        return self.branch_sum.groups

    @property
    def kernel_size(self) -> int:
        """k."""
        return self.branch_sum.shape[-1]

    def tensors(self) -> list[Tensor]:
        """The parameters, in the order of :attr:`branch_sum`'s roles."""
        return [getattr(self, name) for name in self.branch_sum.roles]

    @torch.no_grad()
    def start_from(self, kernel: Tensor, start: str, scale: float = 1.0) -> None:
        """Gives ``origin`` the weights with which the fold is a given kernel.

        Args:
            kernel (Tensor): Shape (O, Ig, k, k).
            start (str): ``'quiet'`` scales ``origin`` by ``scale`` and every other
                branch by zero, and makes the others small, see :meth:`_quieten`;
                ``'balanced'`` keeps all scales and weights.
            scale (float): Defaults to one.

        Raises:
            ValueError: If there is no such branch, its scale is zero, or its weight is
                computed from others.
        """
        if 'origin' not in self.branch_names:
            raise ValueError(
                "only the branch 'origin' can make up for the others, and there are "
                f'only {", ".join(self.branch_names)}'
            )
        row = self.branch_names.index('origin')
        origin = own_parameter(self, 'weight_origin')
        if start == 'quiet':
            self.scale.zero_()
            self.scale[row] = scale
            self._quieten()
        named = {name: getattr(self, name).double() for name in self.branch_sum.roles}
        named['weight_origin'] = torch.zeros_like(named['weight_origin'])
        rest = fold_kernel(self.branch_sum, *named.values())
        if not rest.isfinite().all():
            raise ValueError(
                'the other branches have weights that are not finite, or were never '
                'written (to_empty)'
            )
        solved = solve_scaled_sum(kernel, rest, self.scale[row])
        stored = self.branch_sum.as_stored('weight_origin', solved)
        origin.copy_(stored.view_as(origin))

    def _quieten(self) -> None:
        """Makes the branches so small that the first step is a plain conv's.

        A step along the gradient ``G`` moves the kernel by ``s²·G`` through ``origin``,
        and by ``Σ_b ⟨G,K_b⟩·K_b`` through the scales: about ``Σ_b |K_b|²/√D`` times as
        far, with ``D = Ig·k²``, and no more than ``Σ_b |K_b|²`` times. The sum is left
        at no more than ``√D / 6`` in each output channel.
        """
        named = {name: getattr(self, name).double() for name in self.branch_sum.roles}
        kernels = self.branch_sum.branch_kernels(*named.values())
        kernels.pop('origin')
        if not kernels:
            return
        power = sum(
            kernel.square().flatten(1).sum(dim=1) for kernel in kernels.values()
        )
        limit = math.sqrt(math.prod(self.branch_sum.shape[1:])) / 6
        factor = (limit / power).sqrt().clamp(max=1)
        for name, role in self.branch_sum.roles.items():
            # One parameter of each branch has a row for each output channel.
            if role in _LAST and self._parameters.get(name) is not None:
                rows = self._parameters[name]
                rows.mul_(factor.to(rows).view(-1, *[1] * (rows.dim() - 1)))

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Multiplies the kernel by a factor, shape (O,), for each output channel."""
        self.scale.mul_(factor)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter to write to.

    Args:
        module (nn.Module): What it belongs to.
        name (str): Its name there.

    Raises:
        ValueError: If pruning or a parametrization computes it.
    """
    if module._parameters.get(name) is None:
        raise ValueError(
            f'{name!r} is computed from other tensors (pruned or parametrized), and '
            'what is written to it is lost: call torch.nn.utils.prune.remove or '
            'torch.nn.utils.parametrize.remove_parametrizations before'
        )
    return module._parameters[name]
