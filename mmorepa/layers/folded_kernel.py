"""Kernels that are folds of :mod:`mmorepa.functional`, as modules."""

import torch
import torch.fx
from torch import Tensor, nn

from ..functional import BranchSum, fold_kernel, solve_scaled_sum

# A symbolic trace shows the fold as one node, a function of the branches.
torch.fx.wrap('fold_kernel')


class FoldedKernel(nn.Module):
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
    def start_from(self, kernel: Tensor, start: str) -> None:
        """Gives ``origin`` the weights with which the fold is a given kernel.

        Args:
            kernel (Tensor): Shape (O, Ig, k, k).
            start (str): ``'quiet'`` scales ``origin`` by one and every other branch
                by zero, ``'balanced'`` keeps all scales.

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
            self.scale[row] = 1
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
