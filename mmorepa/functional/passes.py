"""What a fold does to memory between its matrix products, in operations of PyTorch.

:mod:`.compiled_passes` has the same, compiled for a CPU.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Roles(NamedTuple):
    """The tensors of a kernel in the shapes of the products that they enter.

    ``O`` and ``I`` stand for the output and input channels, ``K`` for the taps, ``T``
    for the channels between two composed convs, ``m`` for the maps that the depthwise
    conv makes of each input. None where there is no such branch. The gradients of all
    of them have the same shapes.

    Args:
        scale (Tensor): Shape (branches, O).
        row_of (dict[str, int]): The row of ``scale`` by role: ``'composed'``,
            ``'origin'``, ``'separable'`` and the names in ``filtered``.
        origin (Tensor, optional): Shape (O, I, K).
        second (Tensor, optional): Shape (O, K, T).
        first (Tensor, optional): Shape (T, I).
        separable (Tensor, optional): Shape (O, I, m).
        depthwise (Tensor, optional): Shape (m, K, I).
        filtered (dict[str, Tensor]): By name of the branch, shape (O, I): the weights
            of a filter.
        filters (Tensor, optional): Shape (O, len(filtered), K).
    """

    scale: Tensor
    row_of: dict[str, int]
    origin: Optional[Tensor]
    second: Optional[Tensor]
    first: Optional[Tensor]
    separable: Optional[Tensor]
    depthwise: Optional[Tensor]
    filtered: dict[str, Tensor]
    filters: Optional[Tensor]

    def scale_of(self, role: str, rows: slice) -> Tensor:
        """Some rows of the scale of a branch, a view of shape (rows,)."""
        return self.scale[self.row_of[role], rows]


def combine(kernel: Tensor, rows: slice, composed: Optional[Tensor], t: Roles) -> None:
    """Writes some rows of a kernel, the sum of all branches.

    Args:
        kernel (Tensor): Shape (O, I, K).
        rows (slice): Which of its rows to write.
        composed (Tensor, optional): ``second @ first`` for these rows, shape
            (rows, K, I). May be overwritten.
        t (Roles): The branches.
    """
    block = kernel[rows]
    if composed is None:
        block.zero_()
    else:
        # Scaled on the way to the other order of dimensions.
        scale = t.scale_of('composed', rows)[:, None, None]
        torch.mul(composed.transpose(1, 2), scale, out=block)
    if t.origin is not None:
        block.addcmul_(t.origin[rows], t.scale_of('origin', rows)[:, None, None])
    if t.separable is not None:
        product = torch.einsum('oim,mki->oik', t.separable[rows], t.depthwise)
        block.addcmul_(product, t.scale_of('separable', rows)[:, None, None])
    if t.filtered:
        weights = torch.stack([w[rows] for w in t.filtered.values()], dim=2)
        scales = torch.stack([t.scale_of(name, rows) for name in t.filtered], dim=1)
        block.baddbmm_(weights, t.filters[rows] * scales[:, :, None])


def split(grad: Tensor, rows: slice, t: Roles, d: Roles) -> Tensor:
    """The gradients of all branches but the composed one, for some rows.

    Args:
        grad (Tensor): The gradient of the kernel, shape (O, I, K).
        rows (slice): Which of its rows to go through.
        t (Roles): The branches.
        d (Roles): Where their gradients are written, and that of ``depthwise`` added.

    Returns:
        Tensor: These rows of ``grad`` in another order, shape (rows, K, I), in
        memory of its own.
    """
    g = grad[rows]
    if t.origin is not None:
        _inner_product(t.origin[rows], g, out=d.scale_of('origin', rows))
        scale = t.scale_of('origin', rows)[:, None, None]
        torch.mul(g, scale, out=d.origin[rows])
    if t.separable is not None:
        separable = t.separable[rows]
        scale = t.scale_of('separable', rows)[:, None, None]
        product = torch.einsum('oik,mki->oim', g, t.depthwise)
        _inner_product(separable, product, out=d.scale_of('separable', rows))
        torch.mul(product, scale, out=d.separable[rows])
        d.depthwise.add_(torch.einsum('oim,oik->mki', separable * scale, g))
    if t.filtered:
        products = torch.bmm(t.filters[rows], g.transpose(1, 2)).unbind(1)
        for product, (name, weight) in zip(products, t.filtered.items()):
            torch.sum(weight[rows] * product, dim=1, out=d.scale_of(name, rows))
            scale = t.scale_of(name, rows)[:, None]
            torch.mul(product, scale, out=d.filtered[name][rows])
    return g.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def rescale(rows: slice, by_tap: Tensor, product: Tensor, t: Roles, d: Roles) -> None:
    """The scale of the composed branch, in what was found without it.

    Its own gradient is found on the way: ``⟨G, W₂·C⟩ = ⟨W₂, G·Cᵀ⟩``.

    Args:
        rows (slice): The rows to go through.
        by_tap (Tensor): The result of :func:`split` for them; scaled in place.
        product (Tensor): ``by_tap @ first.t()``, shape (rows, K, T).
        t (Roles): The branches.
        d (Roles): Where the gradient of ``second`` is written.
    """
    _inner_product(t.second[rows], product, out=d.scale_of('composed', rows))
    scale = t.scale_of('composed', rows)[:, None, None]
    torch.mul(product, scale, out=d.second[rows])
    by_tap.mul_(scale)


def _inner_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out[o] = ⟨a[o], b[o]⟩``"""
    torch.sum((a * b).flatten(1), dim=1, out=out)
