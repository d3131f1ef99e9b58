"""What is folded: a sum of branches, and its plain formulas."""

import functools
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from .kernels import (
    average_kernel,
    compose_1x1_kxk,
    constant,
    depthwise_separable_kernel,
    embed_1x1,
    filtered_kernel,
    frequency_prior,
    identity_1x1,
    scaled_sum,
)

# The part that a branch plays in the closed form, and that of each of its parameters,
# in the order in which the compiled code takes them.
_PARTS = {
    'origin': ('origin', {'weight_origin': 'origin'}),
    'pointwise_kxk': (
        'composed',
        {'weight_pointwise_kxk_1': 'first', 'weight_pointwise_kxk_2': 'second'},
    ),
    'pointwise_pointwise': (
        'composed',
        {'weight_first': 'first', 'weight_second': 'second'},
    ),
    'average': ('average', {'weight_average': 'average'}),
    'frequency': ('frequency', {'weight_frequency': 'frequency'}),
    'pointwise': ('pointwise', {'weight_pointwise': 'pointwise'}),
    'depthwise_separable': (
        'separable',
        {'weight_separable': 'separable', 'weight_depthwise': 'depthwise'},
    ),
}


@dataclass(frozen=True)
class Fold:
    """A sum of branches, ``K = Σ_b s_b · K_b`` (paper, section 3.2).

    Args:
        branches (tuple[str, ...]): In the order of the rows of ``scale``.
        shape (tuple[int, ...]): Of the kernel, (O, Ig, k, k).
        groups (int): g. Defaults to 1.
        expansion (int): m. Defaults to 8.
    """

    branches: tuple[str, ...]
    shape: tuple[int, ...]
    groups: int = 1
    expansion: int = 8

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """The parameters by name, in order, with the part that each plays."""
        parts = [roles for b, (_, roles) in _PARTS.items() if b in self.branches]
        return {'scale': 'scale', **{k: v for roles in parts for k, v in roles.items()}}

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """The rows of ``scale``, by the part that their branch plays."""
        return {
            part: self.branches.index(branch)
            for branch, (part, _) in _PARTS.items()
            if branch in self.branches
        }

    @functools.cached_property
    def filtered(self) -> tuple[str, ...]:
        """The branches whose kernels are one weight for each input times a filter."""
        return tuple(n for n in ('average', 'frequency', 'pointwise') if n in self.rows)

    @property
    def has_identity(self) -> bool:
        """Whether the identity is added to ``first``."""
        return 'pointwise_kxk' in self.branches

    def filters(self, like: Tensor, count: int = 1) -> Optional[Tensor]:
        """The filters of :attr:`filtered`, if there are any.

        Args:
            like (Tensor): Has the dtype and the device.
            count (int): How often they are repeated. Defaults to 1.

        Returns:
            Tensor | None: Shape (count·O, F, k²), not to be written to.
        """
        outputs, _, size, _ = self.shape
        if not self.filtered:
            return None
        return constant(_filters, self.filtered, outputs, size, count, like=like)

    def branch_kernels(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The kernels of the branches, unscaled, by the plain formulas.

        Args:
            *tensors (Tensor): The parameters, in the order of :attr:`roles`.

        Returns:
            dict[str, Tensor]: Each of shape (O, Ig, k, k), by branch.
        """
        outputs, inputs, size, _ = self.shape
        p = dict(zip(self.roles, tensors))

        def filtered() -> Tensor:
            weight = p['weight_frequency']
            filters = constant(frequency_prior, outputs, size, like=weight)
            return filtered_kernel(weight, filters)

        def composed() -> Tensor:
            first = p['weight_pointwise_kxk_1']
            identity = constant(identity_1x1, len(first), inputs, like=first)
            second = p['weight_pointwise_kxk_2'].permute(0, 3, 1, 2)
            return compose_1x1_kxk(first + identity, second, self.groups)

        kernels = {
            'origin': lambda: p['weight_origin'],
            'average': lambda: average_kernel(p['weight_average'], size),
            'frequency': filtered,
            'pointwise_kxk': composed,
            'pointwise': lambda: embed_1x1(p['weight_pointwise'], size),
            'depthwise_separable': lambda: depthwise_separable_kernel(
                p['weight_depthwise'],
                p['weight_separable'],
                self.groups,
                self.expansion,
            ),
            'pointwise_pointwise': lambda: compose_1x1_kxk(
                p['weight_first'], p['weight_second'], self.groups
            ),
        }
        return {branch: kernels[branch]() for branch in self.branches}

    def kernel(self, *tensors: Tensor) -> Tensor:
        """The kernel by the plain formulas.

        Args:
            *tensors (Tensor): The parameters, in the order of :attr:`roles`.

        Returns:
            Tensor: Shape (O, Ig, k, k).
        """
        scale, *_ = tensors
        return scaled_sum(list(self.branch_kernels(*tensors).values()), scale)


def _filters(
    branches: tuple[str, ...],
    channels: int,
    size: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    ones = torch.ones(channels, 1, 1, 1, dtype=dtype, device=device)
    filter_of = {
        'average': lambda: average_kernel(ones, size),
        'frequency': lambda: frequency_prior(channels, size, dtype, device),
        'pointwise': lambda: embed_1x1(ones, size),
    }
    filters = [filter_of[branch]().reshape(channels, -1) for branch in branches]
    return torch.stack(filters, dim=1).repeat(count, 1, 1)
