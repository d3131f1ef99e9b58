"""A kernel as a sum of branches, with the plain formula of each branch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from .kernels import (
    average_kernel,
    cached_constant,
    compose_1x1_kxk,
    depthwise_separable_kernel,
    embed_1x1,
    filtered_kernel,
    frequency_prior,
    identity_1x1,
    scaled_sum,
)

# Each branch has a part, its name in the closed form, and each of its parameters has a
# role there. The compiled code expects the parameters in this order.
_BRANCHES = {
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
_FILTERED = ('average', 'frequency', 'pointwise')


@dataclass(frozen=True)
class BranchSum:
    """A sum of branches, ``K = Σ_b s_b · K_b`` (paper, section 3.2).

    Args:
        names (tuple[str, ...]): The branches, in the order of the rows of ``scale``.
        shape (tuple[int, ...]): The shape of the kernel, (O, Ig, k, k).
        groups (int): g. Defaults to 1.
        expansion (int): m. Defaults to 8.

    Attributes:
        roles (dict[str, str]): The role of each parameter, by its name, in order.
        rows (dict[str, int]): The row of ``scale`` for each branch, by its part.
        filtered (tuple[str, ...]): The branches that are a weight times a filter.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    groups: int = 1
    expansion: int = 8

    def __post_init__(self) -> None:
        roles, rows = {'scale': 'scale'}, {}
        for name, (part, its_roles) in _BRANCHES.items():
            if name in self.names:
                roles.update(its_roles)
                rows[part] = self.names.index(name)
        filtered = tuple(part for part in rows if part in _FILTERED)
        vars(self).update(roles=roles, rows=rows, filtered=filtered)

    @property
    def has_identity(self) -> bool:
        """Whether the identity is added to ``first``."""
        return 'pointwise_kxk' in self.names

    def check_shapes(self, shapes: Sequence[torch.Size]) -> None:
        """Raises a ValueError for parameters that a closed form would misread."""
        outputs, inputs, size, _ = self.shape
        taps = size * size
        p = dict(zip(self.roles.values(), shapes))
        hidden = p['first'][0] if p.get('first') else 0
        expected = {
            'scale': (len(self.names), outputs),
            'origin': (outputs, taps, inputs),
            'first': (hidden, inputs, 1, 1),
            'second': (outputs, taps, hidden // self.groups),
            'separable': (outputs, self.expansion, inputs),
            'depthwise': (self.expansion, taps, inputs * self.groups),
        }
        filtered = (outputs, inputs, 1, 1)
        for name, (role, actual) in zip(self.roles, p.items()):
            shape = expected.get(role, filtered)
            # 1×1 kernels are stored as (O, I, 1, 1), like the weight of a conv.
            is_flat = taps == 1 and math.prod(actual) == math.prod(shape)
            if actual != shape and not is_flat:
                raise ValueError(
                    f'{name} has the shape {tuple(actual)}, and a kernel of '
                    f'{tuple(self.shape)} takes {shape}; weights of an earlier version '
                    'are reordered where a state dict is loaded'
                )

    def filters(self, like: Tensor) -> Optional[Tensor]:
        """The filters of :attr:`filtered`, (F, O, k²), or None. Do not write to it."""
        return cached_constant(_filters, self, like=like) if self.filtered else None

    def as_stored(self, name: str, weight: Tensor) -> Tensor:
        """Reorders the weight of a conv to the shape of the stored parameter.

        Input channels come last, as in the memory of a kernel with channels last:
        ``weight_origin`` is (O, k², Ig), ``weight_pointwise_kxk_2`` (O, k², T/g),
        ``weight_separable`` (O, m, Ig) and ``weight_depthwise`` (m, k², I). All other
        parameters keep the shape of a conv's weight.
        """
        if name in ('weight_origin', 'weight_pointwise_kxk_2'):
            return weight.flatten(2).transpose(1, 2).contiguous()
        if name == 'weight_separable':
            maps = weight.reshape(len(weight), -1, self.expansion)
            return maps.transpose(1, 2).contiguous()
        if name == 'weight_depthwise':
            maps = weight.reshape(-1, self.expansion, self.shape[-1] ** 2)
            return maps.permute(1, 2, 0).contiguous()
        return weight

    def as_conv(self, name: str, stored: Tensor) -> Tensor:
        """The inverse of :meth:`as_stored`."""
        size = self.shape[-2:]
        if stored.dim() != 3:
            return stored
        if name == 'weight_separable':
            return stored.transpose(1, 2).flatten(1)[:, :, None, None]
        if name == 'weight_depthwise':
            return stored.permute(2, 0, 1).reshape(-1, 1, *size)
        return stored.transpose(1, 2).unflatten(2, size)

    def from_former(self, name: str, tensor: Tensor) -> Tensor:
        """Reorders a parameter of an earlier version, or the optimizer's state of it.

        Earlier versions stored the weights of convs, and ``weight_pointwise_kxk_2`` as
        (O, k, k, T/g). A tensor that has the current shape is returned unchanged.
        """
        if tensor.dim() != 4:
            return tensor
        if name == 'weight_pointwise_kxk_2':
            return tensor.flatten(1, 2)
        if name == 'weight_depthwise' and tensor.shape[2:] != self.shape[2:]:
            return tensor  # It is of another kernel: the loader reports that.
        return self.as_stored(name, tensor)

    def kernel(self, *tensors: Tensor) -> Tensor:
        """The kernel, (O, Ig, k, k), from the parameters by the plain formulas."""
        scale, *_ = tensors
        return scaled_sum([*self.branch_kernels(*tensors).values()], scale)

    def branch_kernels(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The kernels ``K_b``, (O, Ig, k, k), by branch name, before scaling."""
        p = dict(zip(self.roles, tensors))
        return {name: self.branch_kernel(name, p) for name in self.names}

    def branch_kernel(self, name: str, parameters: dict[str, Tensor]) -> Tensor:
        """The kernel of one branch. The parameters are given by name."""
        size = self.shape[-1]
        _, names = _BRANCHES[name]
        weight, *second = (self.as_conv(name, parameters[name]) for name in names)
        if name == 'origin':
            return weight
        if name == 'average':
            return average_kernel(weight, size)
        if name == 'frequency':
            filters = cached_constant(frequency_prior, self.shape[0], size, like=weight)
            return filtered_kernel(weight, filters)
        if name == 'pointwise':
            return embed_1x1(weight, size)
        if name == 'depthwise_separable':
            return depthwise_separable_kernel(
                *second, weight, self.groups, self.expansion
            )
        if name == 'pointwise_kxk':
            identity = cached_constant(identity_1x1, *weight.shape[:2], like=weight)
            weight = weight + identity
        return compose_1x1_kxk(weight, *second, self.groups)


def _filters(spec: BranchSum, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The kernels of the filtered branches if all their weights are one."""
    ones = torch.ones(spec.shape[0], 1, 1, 1, dtype=dtype, device=device)
    weights = {f'weight_{name}': ones for name in spec.filtered}
    filters = [spec.branch_kernel(name, weights) for name in spec.filtered]
    return torch.stack(filters).flatten(2)
