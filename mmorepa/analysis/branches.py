"""The equivalent kernel of each branch: how alike they are, and what each gives."""

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
        name (str): The conv's name in its network; a deep linear conv has a layer
            ``NAME.1``, ``NAME.2``, … for each of its factors.
        kernels (dict[str, Tensor]): By branch, (O, Ig, k, k), with its scale and all
            BatchNorms. They add up to the folded kernel.
        scales (dict[str, Tensor]): By branch, its factor for each output channel, (O,):
            a row of ``scale``, or ``γ/√(σ²+ε)`` of its last BatchNorm.
    """

    name: str
    kernels: dict[str, Tensor]
    scales: dict[str, Tensor]


class Share(NamedTuple):
    """What a branch puts into a folded kernel ``K = Σ_b K_b``.

    What follows undoes the scale of an output channel, so that all channels o count the
    same: each is divided by ``t_o = Σ_b ‖K_b,o‖`` before. Each of both adds up to 1
    over the branches of a layer.

    Args:
        size (float): The mean of ``‖K_b,o‖ / t_o`` over o: the branch's part of all
            that is added up, at least 0.
        projection (float): ``⟨K_b, K⟩ / ⟨K, K⟩`` of the divided kernels: its part of
            what comes out; a branch that others cancel is near 0 or below.
    """

    size: float
    projection: float


@torch.no_grad()
def branch_kernels(
    model: nn.Module, dtype: torch.dtype = torch.float64
) -> list[BranchKernels]:
    """The branches of every re-parameterised layer of a model, in order.

    Args:
        model (nn.Module): In training form. What is deployed or has a single branch is
            left out.
        dtype (torch.dtype): What OREPA's branches are computed in; those with a
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
    # 0/0 for a kernel of zeros, which has no direction.
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def shares(kernels: Mapping[str, Tensor]) -> dict[str, Share]:
    """What each branch puts into the folded kernel, by branch; NaN if all are zero."""
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
    """How far a kernel of shape (O, Ig, k, k) moved, as a BatchNorm after it sees it.

    It undoes the scale of each output channel, so that the step of a channel counts
    relative to that channel: the root of the mean of ``‖ΔW_o‖² / ‖W_o‖²`` over them.
    Channels of zeros are left out; it is 0 if there are no others.
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
        # The norm belongs to what the factors make, not to one of them.
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
            # An OREPA conv as a branch: its own branches are those of the layer.
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
