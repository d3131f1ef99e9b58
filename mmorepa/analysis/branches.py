"""The equivalent kernels of branches, their similarities and their shares."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import embed_1x1
from ..layers import (
    BranchKernel,
    DeepLinearKernel,
    MultiBranchConv2d,
    ReparamConv2d,
    outermost,
)
from ..layers.folding import is_fusible, norm_scale


class BranchKernels(NamedTuple):
    """The branches of a layer.

    Args:
        name (str): The conv's name in its network. A deep linear conv has a layer
            ``NAME.1``, ``NAME.2``, … for each of its factors.
        kernels (dict[str, Tensor]): The kernel of each branch, (O, Ig, k, k), with its
            scale and all BatchNorms. They add up to the folded kernel.
        scales (dict[str, Tensor]): The factor of each branch by output channel, (O,): a
            row of ``scale``, or ``γ/√(σ²+ε)`` of its last BatchNorm.
    """

    name: str
    kernels: dict[str, Tensor]
    scales: dict[str, Tensor]


class Share(NamedTuple):
    """The share of a branch in a folded kernel ``K = Σ_b K_b``.

    A BatchNorm after the conv undoes the scale of its output channels. So that all
    channels o count the same, their kernels are divided by ``t_o = Σ_b ‖K_b,o‖`` first.
    Both shares add up to 1 over the branches of a layer.

    Args:
        size (float): The mean of ``‖K_b,o‖ / t_o`` over o, at least 0: the share of the
            branch in the summands.
        projection (float): ``⟨K_b, K⟩ / ⟨K, K⟩`` of the divided kernels: the share of
            the branch in the sum. It is near 0 or below if other branches cancel it.
    """

    size: float
    projection: float


@torch.no_grad()
def branch_kernels(
    model: nn.Module, dtype: torch.dtype = torch.float64
) -> list[BranchKernels]:
    """The branches of every re-parameterised layer of a model, in order.

    Args:
        model (nn.Module): In training form. Layers that are deployed or have a single
            branch are left out.
        dtype (torch.dtype): The precision for OREPA's branches. Branches with a
            BatchNorm each are always in float64. Defaults to float64.
    """
    return [
        layer
        for name, conv in outermost(model)
        if not conv.deployed
        for layer in _layers_of(name, conv, dtype)
        if len(layer.kernels) > 1
    ]


def cosine_similarities(kernels: Mapping[str, Tensor]) -> Tensor:
    """``⟨K_a, K_b⟩ / (‖K_a‖ ‖K_b‖)`` for all pairs of B kernels of one shape.

    Each output channel counts the same, see :class:`Share`.

    Returns:
        Tensor: Shape (B, B); NaN where a kernel is zero.
    """
    rows = _balanced(kernels).flatten(1)
    # A kernel of zeros has no direction, and gives 0/0.
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def shares(kernels: Mapping[str, Tensor]) -> dict[str, Share]:
    """The share of each branch in the folded kernel; NaN if all kernels are zero."""
    rows = _balanced(kernels)
    sizes = rows.norm(dim=2).sum(1)
    projections = (rows * rows.sum(0)).sum((1, 2))
    parts = torch.stack([sizes / sizes.sum(), projections / projections.sum()], dim=1)
    return {name: Share(*part) for name, part in zip(kernels, parts.tolist())}


def _balanced(kernels: Mapping[str, Tensor]) -> Tensor:
    """Shape (B, O, Ig·k²), each output channel divided by its ``Σ_b ‖K_b,o‖``."""
    rows = torch.stack([kernel.flatten(1) for kernel in kernels.values()])
    sizes = rows.norm(dim=2, keepdim=True).sum(dim=0)
    return torch.where(sizes > 0, rows / sizes, 0)


def relative_step(before: Tensor, after: Tensor) -> float:
    """The size of a change of a kernel (O, Ig, k, k), relative in each output channel.

    It is the root of the mean of ``‖ΔW_o‖² / ‖W_o‖²`` over the channels, since a
    BatchNorm after the conv undoes their scales. Channels of zeros are left out. The
    result is 0 if all channels are zero.
    """
    sizes = before.float().square().flatten(1).sum(1)
    moved = (after - before).float().square().flatten(1).sum(1)
    alive = sizes > 0
    if not alive.any():
        return 0.0
    return (moved[alive] / sizes[alive]).mean().sqrt().item()


def _layers_of(
    name: str, conv: ReparamConv2d, dtype: torch.dtype
) -> list[BranchKernels]:
    branches = conv.branches
    if isinstance(conv, MultiBranchConv2d):
        return [_side_by_side(name, conv, dtype)]
    if isinstance(branches, DeepLinearKernel):
        # The norm belongs to the product of the factors, and to none of them.
        return [
            _sum_of_branches(f'{name}.{i}', factor, dtype)
            for i, factor in enumerate(branches.factors, 1)
            if isinstance(factor, BranchKernel)
        ]
    if not isinstance(branches, BranchKernel):
        return []
    layer = _sum_of_branches(name, branches, dtype)
    if not is_fusible(conv.norm):
        return [layer]
    factor = norm_scale(conv.norm).to(dtype)[:, None, None, None]
    return [layer._replace(kernels={k: v * factor for k, v in layer.kernels.items()})]


def _sum_of_branches(
    name: str, kernel: BranchKernel, dtype: torch.dtype
) -> BranchKernels:
    unscaled = kernel.branch_sum.branch_kernels(
        *(t.to(dtype) for t in kernel.tensors())
    )
    scales = dict(zip(unscaled, kernel.scale.to(dtype)))
    kernels = {k: v * scales[k][:, None, None, None] for k, v in unscaled.items()}
    return BranchKernels(name, kernels, scales)


def _side_by_side(
    name: str, conv: MultiBranchConv2d, dtype: torch.dtype
) -> BranchKernels:
    kernels, scales = {}, {}
    for branch_name, branch in conv.branches.items():
        if isinstance(branch, ReparamConv2d) and isinstance(
            branch.branches, BranchKernel
        ):
            # The branches of an OREPA conv become branches of the layer.
            (layer,) = _layers_of(branch_name, branch, dtype)
            kernels.update(layer.kernels)
            scales.update(layer.scales)
            continue
        kernel, _ = branch.equivalent_kernel_bias()
        if kernel.shape[-1] != conv.kernel_size[0]:
            kernel = embed_1x1(kernel, conv.kernel_size[0])
        kernels[branch_name] = kernel
        scales[branch_name] = norm_scale(branch.norm).to(dtype)
    return BranchKernels(name, kernels, scales)
