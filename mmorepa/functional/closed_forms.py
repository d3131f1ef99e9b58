"""OREPA's folds with their derivatives worked out by hand: the fast path.

What ``autograd`` makes of the formulas in :mod:`.kernels` keeps every term of the
sum, each as large as the kernel, and walks through memory for each operation. Here a
fold is one matrix product and a pass, its derivative two products and two passes, and
nothing is kept but the parameters. All goes from block to block of output channels, so
that each step finds in the cache what the one before has left there. The passes are
operations of PyTorch (:mod:`.passes`), or compiled for a CPU (:mod:`.compiled_passes`).

The tests hold both against the plain formulas, and against numerical derivatives.

Tensors are those of the kernel modules in :mod:`mmorepa.layers.orepa`, by name and
without groups. ``G`` stands for the gradient of the kernel, ``s`` for the scale of a
branch; for the other letters see :class:`.passes.Roles`.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from . import compiled_passes, passes
from .kernels import average_kernel, embed_1x1
from .passes import Roles

# The elements of a block: 4 MB in float32, about what the caches of two cores hold.
_BLOCK = 2**20


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
    kernel = tensors['scale'].new_empty(shape) if out is None else out
    _fold(_roles_kxk(tensors, branches, shape), kernel.flatten(2))
    return kernel


@torch.no_grad()
def fold_kxk_gradients(
    tensors: dict[str, Tensor],
    branches: Sequence[str],
    shape: Sequence[int],
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
        shape (Sequence[int]): (O, I, k, k).
        grad (Tensor): G, shape (O, I, k, k).
        out (dict[str, Tensor], optional): Where to write some of the gradients,
            contiguous. Defaults to None.

    Returns:
        dict[str, Tensor]: The gradient of every parameter, by its name.
    """
    found = _gradients_like(tensors, out)
    t = _roles_kxk(tensors, branches, shape)
    _write_gradients(t, grad, _views_kxk(found, branches, shape))
    return found


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
    t = _roles_1x1(tensors, branches)
    kernel = t.origin.new_empty(*t.origin.shape, 1) if out is None else out
    _fold(t, kernel.flatten(2))
    return kernel


@torch.no_grad()
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
    t = _roles_1x1(tensors, branches)
    _write_gradients(t, grad, _roles_1x1(found, branches))
    return found


def _fold(t: Roles, kernel: Tensor) -> None:
    """Writes the kernel, shape (O, I, K)."""
    run = _passes_for(t)
    composed = None
    for rows in _blocks(kernel):
        if t.second is not None:
            composed = torch.matmul(t.second[rows], t.first)
        run.combine(kernel, rows, composed, t)


def _write_gradients(t: Roles, grad: Tensor, d: Roles) -> None:
    """Writes the gradients of the branches, that of the kernel being (O, I, k, k)."""
    run = _passes_for(t)
    grad = grad.contiguous().flatten(2)
    # These are added up.
    sums = d
    if t.depthwise is not None:
        sums = d._replace(depthwise=torch.zeros_like(t.depthwise))
    for number, rows in enumerate(_blocks(grad)):
        by_tap = run.split(grad, rows, t, sums)
        if t.second is None:
            continue
        product = torch.matmul(by_tap, t.first.t())
        run.rescale(rows, by_tap, product, t, d)
        matrices = t.second[rows].flatten(0, 1).t(), by_tap.flatten(0, 1)
        torch.addmm(d.first, *matrices, beta=min(number, 1), out=d.first)
    if t.depthwise is not None:
        d.depthwise.copy_(sums.depthwise)


def _passes_for(t: Roles) -> ModuleType:
    return compiled_passes if compiled_passes.can_take(t) else passes


def _views_kxk(
    tensors: dict[str, Tensor], branches: Sequence[str], shape: Sequence[int]
) -> Roles:
    """The parameters, or their gradients, reshaped to what the products take."""
    outputs, inputs, *size = shape
    taps = size[0] * size[1]
    row_of = {name: row for row, name in enumerate(branches)}
    origin = second = first = separable = depthwise = None
    if 'origin' in row_of:
        origin = tensors['weight_origin'].reshape(outputs, inputs, taps)
    if 'pointwise_kxk' in row_of:
        row_of['composed'] = row_of['pointwise_kxk']
        second = tensors['weight_pointwise_kxk_2'].flatten(1, 2)
        first = tensors['weight_pointwise_kxk_1'].flatten(1)
    if 'depthwise_separable' in row_of:
        row_of['separable'] = row_of['depthwise_separable']
        separable = tensors['weight_separable'].reshape(outputs, inputs, -1)
        depthwise = tensors['weight_depthwise'].reshape(inputs, -1, taps)
        depthwise = depthwise.permute(1, 2, 0)
    filtered = {
        name: tensors[f'weight_{name}'].flatten(1)
        for name in ('average', 'frequency', 'pointwise')
        if name in row_of
    }
    return Roles(
        tensors['scale'],
        row_of,
        origin,
        second,
        first,
        separable,
        depthwise,
        filtered,
        filters=None,
    )


def _roles_kxk(
    tensors: dict[str, Tensor], branches: Sequence[str], shape: Sequence[int]
) -> Roles:
    t = _views_kxk(tensors, branches, shape)
    outputs, _, size, _ = shape
    first, filters = t.first, None
    if first is not None:
        first = first + tensors['identity'].flatten(1)
    if t.filtered:
        one = t.scale.new_ones(1, 1, 1, 1)
        filter_of = {
            'average': lambda: average_kernel(one, size),
            'frequency': lambda: tensors['filters'],
            'pointwise': lambda: embed_1x1(one, size),
        }
        rows = [filter_of[name]().reshape(-1, size**2) for name in t.filtered]
        filters = torch.stack([row.expand(outputs, -1) for row in rows], dim=1)
    return _contiguous(t._replace(first=first, filters=filters))


def _roles_1x1(tensors: dict[str, Tensor], branches: Sequence[str]) -> Roles:
    row_of = {name: row for row, name in enumerate(branches)}
    row_of['composed'] = row_of['pointwise_pointwise']
    return _contiguous(
        Roles(
            tensors['scale'],
            row_of,
            origin=tensors['weight_origin'].flatten(2),
            second=tensors['weight_second'].flatten(2).transpose(1, 2),
            first=tensors['weight_first'].flatten(1),
            separable=None,
            depthwise=None,
            filtered={},
            filters=None,
        )
    )


def _contiguous(t: Roles) -> Roles:
    """The same with every tensor in one piece, most of which are."""
    return Roles(*(x.contiguous() if isinstance(x, Tensor) else x for x in t))._replace(
        filtered={name: weight.contiguous() for name, weight in t.filtered.items()}
    )


def _gradients_like(
    tensors: dict[str, Tensor], out: Optional[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Memory for the gradients of all parameters, unwritten."""
    found = {}
    for name, tensor in tensors.items():
        if name == 'scale' or name.startswith('weight_'):
            memory = (out or {}).get(name)
            if memory is None:
                memory = tensor.new_empty(tensor.shape)
            found[name] = memory
    return found


def _blocks(kernel: Tensor) -> Iterator[slice]:
    """Rows of ``kernel``, shape (O, …), as many at a time as suit the device."""
    rows = kernel.shape[0]
    step = rows
    if kernel.device.type == 'cpu':
        step = -(-rows // -(-kernel.numel() // _BLOCK))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
