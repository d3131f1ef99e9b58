"""OREPA's folds with their derivatives worked out by hand: the fast path.

What ``autograd`` makes of the formulas in :mod:`.kernels` keeps every term of the
sum, each as large as the kernel, and walks through memory for each operation. Here a
fold is one matrix product and a few passes, its derivative two products and a few
passes, and nothing is kept but the parameters. All goes from block to block of output
channels, so that each step finds in the cache what the one before has left there. On a
CPU the same is done by :mod:`.compiled`, where that is available.

The tests hold all of this against the plain formulas and numerical derivatives.

Tensors are those of the kernel modules in :mod:`mmorepa.layers.orepa`, by name and
without groups. ``T`` stands for the channels between two composed convs, ``K = k²``
for the taps, ``m`` for the maps of the depthwise conv, ``G`` for the gradient of the
kernel and ``s`` for the scale of a branch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..utils.autocast import no_autocast
from . import compiled
from .compiled import Branches, Parameters
from .kernels import average_kernel, embed_1x1

# The elements of a block: 4 MB in float32, about what the caches of two cores hold.
_BLOCK = 2**20


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
    kernel = tensors['scale'].new_empty(shape) if out is None else out
    _fold(_branches_kxk(tensors, branches), kernel)
    return kernel


def fold_kxk_gradients(
    tensors: dict[str, Tensor],
    branches: Sequence[str],
    grad: Tensor,
    out: Optional[dict[str, Tensor]] = None,
) -> dict[str, Tensor]:
    """The derivative of :func:`fold_kxk`: ``Jᵀ·G``.

    The gradient of a kernel is ``s·G``, that of one factor of a product is ``s·G``
    times the other one, and that of ``s`` is the inner product of ``G`` and the
    branch's kernel, taken where it is cheap: ``⟨G, W₂·C⟩ = ⟨W₂, G·Cᵀ⟩``.

    Args:
        tensors (dict[str, Tensor]): As for :func:`fold_kxk`.
        branches (Sequence[str]): As for :func:`fold_kxk`.
        grad (Tensor): G, shape (O, I, k, k).
        out (dict[str, Tensor], optional): Where to write some of the gradients,
            contiguous. Defaults to None.

    Returns:
        dict[str, Tensor]: The gradient of every parameter, by its name.
    """
    found = _gradients_like(tensors, out)
    d = _parameters_kxk(found)
    _fold_gradients(_branches_kxk(tensors, branches), grad.contiguous(), d)
    return found


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
    origin = tensors['weight_origin']
    kernel = origin.new_empty(origin.shape) if out is None else out
    _fold(_branches_1x1(tensors, branches), kernel)
    return kernel


def fold_1x1_gradients(
    tensors: dict[str, Tensor],
    branches: Sequence[str],
    grad: Tensor,
    out: Optional[dict[str, Tensor]] = None,
) -> dict[str, Tensor]:
    """The derivative of :func:`fold_1x1`, by the rules of :func:`fold_kxk_gradients`.

    Args:
        tensors (dict[str, Tensor]): As for :func:`fold_1x1`.
        branches (Sequence[str]): As for :func:`fold_1x1`.
        grad (Tensor): G, shape (O, I, 1, 1).
        out (dict[str, Tensor], optional): As for :func:`fold_kxk_gradients`.

    Returns:
        dict[str, Tensor]: The gradient of every parameter, by its name.
    """
    found = _gradients_like(tensors, out)
    d = _parameters_1x1(found)
    _fold_gradients(_branches_1x1(tensors, branches), grad.contiguous(), d)
    return found


def _fold(t: Branches, kernel: Tensor) -> None:
    """Writes the kernel, shape (O, I, k, k)."""
    if compiled.fold(t, kernel):
        return
    with torch.no_grad(), no_autocast(kernel.device.type):
        _fold_in_operations(t, kernel)


def _fold_in_operations(t: Branches, kernel: Tensor) -> None:
    m = _matrices(t, kernel.shape)
    for rows in _blocks(kernel):
        block = kernel[rows].flatten(2)
        scale = {b: t.parameters.scale[r, rows, None, None] for b, r in t.rows.items()}
        if m.second is None:
            block.zero_()
        else:
            composed = torch.matmul(m.second[rows], m.first)
            # Scaled on the way to the other order of dimensions.
            torch.mul(composed.transpose(1, 2), scale['composed'], out=block)
        if m.origin is not None:
            block.addcmul_(m.origin[rows], scale['origin'])
        if m.separable is not None:
            product = torch.einsum('oim,imk->oik', m.separable[rows], m.depthwise)
            block.addcmul_(product, scale['separable'])
        if m.filtered:
            weights = torch.stack([w[rows] for w in m.filtered.values()], dim=2)
            scales = torch.cat([scale[branch] for branch in m.filtered], dim=1)
            block.baddbmm_(weights, m.filters[rows] * scales)


def _fold_gradients(t: Branches, grad: Tensor, d: Parameters) -> None:
    """Writes the gradients of the parameters, that of the kernel being (O, I, k, k)."""
    if compiled.fold_gradients(t, grad, d):
        return
    with torch.no_grad(), no_autocast(grad.device.type):
        _fold_gradients_in_operations(t, grad, d)


def _fold_gradients_in_operations(t: Branches, grad: Tensor, d: Parameters) -> None:
    m, dm = _matrices(t, grad.shape), _views(d, grad.shape)
    for added_up in (dm.first, dm.depthwise):
        if added_up is not None:
            added_up.zero_()
    for rows in _blocks(grad):
        g = grad[rows].flatten(2)
        scale = {b: t.parameters.scale[r, rows, None, None] for b, r in t.rows.items()}
        d_scale = {branch: d.scale[row, rows] for branch, row in t.rows.items()}
        if m.second is not None:
            s, second = scale['composed'], m.second[rows]
            by_tap = g.transpose(1, 2)
            product = torch.matmul(by_tap, m.first.t())
            _inner_product(second, product, out=d_scale['composed'])
            torch.mul(product, s, out=dm.second[rows])
            scaled = (by_tap * s).flatten(0, 1)
            dm.first.addmm_(second.flatten(0, 1).t(), scaled)
        if m.origin is not None:
            _inner_product(m.origin[rows], g, out=d_scale['origin'])
            torch.mul(g, scale['origin'], out=dm.origin[rows])
        if m.separable is not None:
            s, separable = scale['separable'], m.separable[rows]
            product = torch.einsum('oik,imk->oim', g, m.depthwise)
            _inner_product(separable, product, out=d_scale['separable'])
            torch.mul(product, s, out=dm.separable[rows])
            dm.depthwise.baddbmm_((separable * s).permute(1, 2, 0), g.transpose(0, 1))
        if m.filtered:
            products = torch.bmm(m.filters[rows], g.transpose(1, 2)).unbind(1)
            for product, (branch, weight) in zip(products, m.filtered.items()):
                torch.sum(weight[rows] * product, dim=1, out=d_scale[branch])
                s = scale[branch].squeeze(2)
                torch.mul(product, s, out=dm.filtered[branch][rows])


def _branches_kxk(tensors: dict[str, Tensor], branches: Sequence[str]) -> Branches:
    names = {'pointwise_kxk': 'composed', 'depthwise_separable': 'separable'}
    return Branches(
        _parameters_kxk(tensors),
        {names.get(branch, branch): row for row, branch in enumerate(branches)},
        tensors.get('identity'),
        tensors.get('filters'),
    )


def _parameters_kxk(tensors: dict[str, Tensor]) -> Parameters:
    return Parameters(
        tensors['scale'],
        tensors.get('weight_origin'),
        tensors.get('weight_pointwise_kxk_1'),
        tensors.get('weight_pointwise_kxk_2'),
        tensors.get('weight_separable'),
        tensors.get('weight_depthwise'),
        tensors.get('weight_average'),
        tensors.get('weight_frequency'),
        tensors.get('weight_pointwise'),
    )


def _branches_1x1(tensors: dict[str, Tensor], branches: Sequence[str]) -> Branches:
    rows = {
        'composed': branches.index('pointwise_pointwise'),
        'origin': branches.index('origin'),
    }
    return Branches(_parameters_1x1(tensors), rows)


def _parameters_1x1(tensors: dict[str, Tensor]) -> Parameters:
    names = ('scale', 'weight_origin', 'weight_first', 'weight_second')
    return Parameters(*(tensors[name] for name in names))


def _gradients_like(
    tensors: dict[str, Tensor], out: Optional[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Memory for the gradients of all parameters, unwritten."""
    found = dict(out or {})
    for name, tensor in tensors.items():
        is_parameter = name == 'scale' or name.startswith('weight_')
        if is_parameter and name not in found:
            found[name] = tensor.new_empty(tensor.shape)
    return found


class _Matrices(NamedTuple):
    """Parameters in the shapes of the products that they enter."""

    origin: Optional[Tensor]  # (O, I, K)
    second: Optional[Tensor]  # (O, K, T)
    first: Optional[Tensor]  # (T, I)
    separable: Optional[Tensor]  # (O, I, m)
    depthwise: Optional[Tensor]  # (I, m, K)
    filtered: dict[str, Tensor]  # (O, I) each: a weight of a filter
    filters: Optional[Tensor]  # (O, filtered, K)


def _views(p: Parameters, shape: Sequence[int]) -> _Matrices:
    outputs, inputs, *size = shape
    taps = size[0] * size[1]

    def view(tensor: Optional[Tensor], *sizes: int) -> Optional[Tensor]:
        return None if tensor is None else tensor.reshape(sizes)

    filtered = dict(average=p.average, frequency=p.frequency, pointwise=p.pointwise)
    return _Matrices(
        view(p.origin, outputs, inputs, taps),
        view(p.second, outputs, taps, -1),
        view(p.first, -1, inputs),
        view(p.separable, outputs, inputs, -1),
        view(p.depthwise, inputs, -1, taps),
        {b: view(w, outputs, inputs) for b, w in filtered.items() if w is not None},
        filters=None,
    )


def _matrices(t: Branches, shape: Sequence[int]) -> _Matrices:
    m = _views(t.parameters, shape)
    outputs, _, size, _ = shape
    if t.identity is not None:
        m = m._replace(first=m.first + t.identity.flatten(1))
    if m.filtered:
        ones = t.parameters.scale.new_ones(outputs, 1, 1, 1)
        filter_of = {
            'average': lambda: average_kernel(ones, size),
            'frequency': lambda: t.filters,
            'pointwise': lambda: embed_1x1(ones, size),
        }
        filters = [filter_of[branch]().reshape(outputs, -1) for branch in m.filtered]
        m = m._replace(filters=torch.stack(filters, dim=1))
    return m


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
