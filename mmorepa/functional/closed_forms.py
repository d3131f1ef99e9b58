"""OREPA's folds with their derivatives worked out by hand: the fast path.

What ``autograd`` makes of the formulas in :mod:`.kernels` keeps every term of the
sum, each as large as the kernel, and walks through memory for each operation. Here a
fold is one matrix product and a few passes, its derivative two products and a few
passes, and nothing is kept but the parameters. The passes go from block to block of
output channels, so that each finds in the cache what the one before has left there.

The tests hold the two against each other, and against numerical derivatives.

Tensors are those of the kernel modules in :mod:`mmorepa.layers.orepa`, by name and
without groups. ``T`` stands for the channels between two composed convs, ``K = k²``
for the taps, ``G`` for the gradient of the kernel and ``s`` for the scale of a branch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .kernels import average_kernel, embed_1x1

# The elements of a block: 2 MB in float32, which the cache of a core can hold.
_BLOCK = 2**19


@torch.no_grad()
def fold_kxk(
    tensors: dict[str, Tensor],
    branches: Sequence[str],
    shape: Sequence[int],
    out: Optional[Tensor] = None,
) -> Tensor:
    """The k×k kernel of OREPA: ``Σ_b s_b · K_b``.

    Args:
        tensors (dict[str, Tensor]): Parameters and buffers of an ``OREPAKernel``.
        branches (Sequence[str]): Its branches, in the order of the rows of ``scale``.
        shape (Sequence[int]): (O, I, k, k).
        out (Tensor, optional): Where to write the kernel, contiguous. Defaults to
            None.

    Returns:
        Tensor: Shape (O, I, k, k), without a graph.
    """
    t = _by_role(tensors, branches, shape)
    kernel = t.scale.new_empty(shape) if out is None else out
    for rows in _blocks(kernel):
        block = kernel[rows].flatten(2)
        scale = dict(zip(branches, t.scale[:, rows, None, None]))
        if 'pointwise_kxk' in scale:
            composed = torch.matmul(t.second[rows], t.first)
            # Scaled on the way to the other order of dimensions.
            torch.mul(composed.transpose(1, 2), scale['pointwise_kxk'], out=block)
        else:
            block.zero_()
        if 'origin' in scale:
            block.addcmul_(t.origin[rows], scale['origin'])
        if 'depthwise_separable' in scale:
            product = torch.einsum('oim,imk->oik', t.separable[rows], t.depthwise)
            block.addcmul_(product, scale['depthwise_separable'])
        if t.filtered:
            weights = torch.stack([w[rows] for w in t.filtered.values()], dim=2)
            scales = torch.cat([scale[name] for name in t.filtered], dim=1)
            block.baddbmm_(weights, t.filters[rows] * scales)
    return kernel


@torch.no_grad()
def fold_kxk_gradients(
    tensors: dict[str, Tensor],
    branches: Sequence[str],
    shape: Sequence[int],
    grad: Tensor,
) -> dict[str, Tensor]:
    """The derivative of :func:`fold_kxk`: ``Jᵀ·G``.

    The gradient of a kernel is ``s·G``, that of one factor of a product is ``s·G``
    times the other one, and that of ``s`` is the inner product of ``G`` and the
    branch's kernel, taken where it is cheap: ``⟨G, W₂·C⟩ = ⟨W₂, G·Cᵀ⟩``.

    Args:
        tensors (dict[str, Tensor]): As for :func:`fold_kxk`.
        branches (Sequence[str]): As for :func:`fold_kxk`.
        shape (Sequence[int]): (O, I, k, k).
        grad (Tensor): G, shape (O, I, k, k).

    Returns:
        dict[str, Tensor]: The gradient of every parameter, by its name.
    """
    t = _by_role(tensors, branches, shape)
    grad = grad.contiguous()
    d_scale = torch.empty_like(t.scale)
    found = {'scale': d_scale}
    if 'origin' in branches:
        d_origin = torch.empty_like(t.origin)
        found['weight_origin'] = d_origin
    if 'pointwise_kxk' in branches:
        d_second = torch.empty_like(t.second)
        d_first = torch.zeros_like(t.first)
        found['weight_pointwise_kxk_1'] = d_first
        found['weight_pointwise_kxk_2'] = d_second
    if 'depthwise_separable' in branches:
        d_separable = torch.empty_like(t.separable)
        d_depthwise = torch.zeros_like(t.depthwise)
        found['weight_separable'] = d_separable
        found['weight_depthwise'] = d_depthwise
    d_filtered = {name: torch.empty_like(w) for name, w in t.filtered.items()}
    found.update({f'weight_{name}': d for name, d in d_filtered.items()})

    for rows in _blocks(grad):
        g = grad[rows].flatten(2)
        scale = dict(zip(branches, t.scale[:, rows, None, None]))
        ds = dict(zip(branches, d_scale[:, rows]))
        if 'pointwise_kxk' in scale:
            s, second, d = scale['pointwise_kxk'], t.second[rows], d_second[rows]
            by_tap = g.transpose(1, 2).contiguous()
            torch.mm(by_tap.flatten(0, 1), t.first.t(), out=d.flatten(0, 1))
            _inner_product(second, d, out=ds['pointwise_kxk'])
            d.mul_(s)
            by_tap.mul_(s)
            d_first.addmm_(second.flatten(0, 1).t(), by_tap.flatten(0, 1))
        if 'origin' in scale:
            _inner_product(t.origin[rows], g, out=ds['origin'])
            torch.mul(g, scale['origin'], out=d_origin[rows])
        if 'depthwise_separable' in scale:
            s, separable = scale['depthwise_separable'], t.separable[rows]
            product = torch.einsum('oik,imk->oim', g, t.depthwise)
            _inner_product(separable, product, out=ds['depthwise_separable'])
            torch.mul(product, s, out=d_separable[rows])
            d_depthwise.baddbmm_((separable * s).permute(1, 2, 0), g.transpose(0, 1))
        if t.filtered:
            products = torch.bmm(t.filters[rows], g.transpose(1, 2)).unbind(1)
            for product, (name, weight) in zip(products, t.filtered.items()):
                torch.sum(weight[rows] * product, dim=1, out=ds[name])
                torch.mul(product, scale[name].squeeze(2), out=d_filtered[name][rows])
    return {name: d.reshape(tensors[name].shape) for name, d in found.items()}


@torch.no_grad()
def fold_1x1(
    tensors: dict[str, Tensor], branches: Sequence[str], out: Optional[Tensor] = None
) -> Tensor:
    """The 1×1 kernel of OREPA: ``s₀·W + s₁·(W₂·W₁)``.

    Args:
        tensors (dict[str, Tensor]): Those of an ``OREPAPointwiseKernel`` with both
            branches.
        branches (Sequence[str]): In the order of the rows of ``scale``.
        out (Tensor, optional): Where to write the kernel, contiguous. Defaults to
            None.

    Returns:
        Tensor: Shape (O, I, 1, 1), without a graph.
    """
    origin, first, second = _matrices(tensors)
    scale = dict(zip(branches, tensors['scale'][:, :, None]))
    kernel = torch.mm(second, first, out=None if out is None else out.flatten(1))
    for rows in _blocks(kernel):
        block = kernel[rows].mul_(scale['pointwise_pointwise'][rows])
        block.addcmul_(origin[rows], scale['origin'][rows])
    return kernel[:, :, None, None]


@torch.no_grad()
def fold_1x1_gradients(
    tensors: dict[str, Tensor], branches: Sequence[str], grad: Tensor
) -> dict[str, Tensor]:
    """The derivative of :func:`fold_1x1`, by the rules of :func:`fold_kxk_gradients`.

    Args:
        tensors (dict[str, Tensor]): As for :func:`fold_1x1`.
        branches (Sequence[str]): As for :func:`fold_1x1`.
        grad (Tensor): G, shape (O, I, 1, 1).

    Returns:
        dict[str, Tensor]: The gradient of every parameter, by its name.
    """
    origin, first, second = _matrices(tensors)
    grad = grad.flatten(1)
    d_origin, d_second = torch.empty_like(origin), torch.empty_like(second)
    d_first = torch.zeros_like(first)
    d_scale = torch.empty_like(tensors['scale'])
    for rows in _blocks(grad):
        g, d = grad[rows], d_second[rows]
        scale = dict(zip(branches, tensors['scale'][:, rows, None]))
        ds = dict(zip(branches, d_scale[:, rows]))
        torch.mm(g, first.t(), out=d)
        _inner_product(second[rows], d, out=ds['pointwise_pointwise'])
        d.mul_(scale['pointwise_pointwise'])
        d_first.addmm_(second[rows].t(), g * scale['pointwise_pointwise'])
        _inner_product(origin[rows], g, out=ds['origin'])
        torch.mul(g, scale['origin'], out=d_origin[rows])
    found = dict(
        weight_origin=d_origin,
        weight_first=d_first,
        weight_second=d_second,
        scale=d_scale,
    )
    return {name: d.reshape(tensors[name].shape) for name, d in found.items()}


class _ByRole(NamedTuple):
    """The tensors of a k×k kernel in the shapes of the products they enter."""

    scale: Tensor  # (branches, O)
    origin: Optional[Tensor]  # (O, I, K)
    second: Optional[Tensor]  # (O, K, T)
    first: Optional[Tensor]  # (T, I)
    separable: Optional[Tensor]  # (O, I, m)
    depthwise: Optional[Tensor]  # (I, m, K)
    filtered: dict[str, Tensor]  # (O, I) each: a weight of a filter
    filters: Optional[Tensor]  # (O, filtered, K)


def _by_role(
    tensors: dict[str, Tensor], branches: Sequence[str], shape: Sequence[int]
) -> _ByRole:
    outputs, inputs, *size = shape
    taps = size[0] * size[1]
    origin = second = first = separable = depthwise = None
    if 'origin' in branches:
        origin = tensors['weight_origin'].reshape(outputs, inputs, taps).contiguous()
    if 'pointwise_kxk' in branches:
        second = tensors['weight_pointwise_kxk_2'].flatten(1, 2).contiguous()
        first = tensors['weight_pointwise_kxk_1'] + tensors['identity']
        first = first.flatten(1)
    if 'depthwise_separable' in branches:
        separable = tensors['weight_separable'].reshape(outputs, inputs, -1)
        depthwise = tensors['weight_depthwise'].reshape(inputs, -1, taps)
    ones = tensors['scale'].new_ones(outputs, 1, 1, 1)
    filter_of = {
        'average': lambda: average_kernel(ones, size[0]),
        'frequency': lambda: tensors['filters'],
        'pointwise': lambda: embed_1x1(ones, size[0]),
    }
    names = [name for name in filter_of if name in branches]
    filtered = {name: tensors[f'weight_{name}'].flatten(1) for name in names}
    filters = [filter_of[name]().reshape(outputs, taps) for name in names]
    return _ByRole(
        tensors['scale'],
        origin,
        second,
        first,
        separable,
        depthwise,
        filtered,
        torch.stack(filters, dim=1) if filters else None,
    )


def _matrices(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    names = ('weight_origin', 'weight_first', 'weight_second')
    origin, first, second = (tensors[name].flatten(1) for name in names)
    return origin, first, second


def _blocks(kernel: Tensor) -> Iterator[slice]:
    """Rows of ``kernel``, shape (O, …), as many at a time as suit the device."""
    rows = kernel.shape[0]
    step = rows
    if kernel.device.type == 'cpu':
        step = -(-rows // -(-kernel.numel() // _BLOCK))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _inner_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out[o] = ⟨a[o], b[o]⟩``"""
    torch.sum((a * b).flatten(1), dim=1, out=out)
