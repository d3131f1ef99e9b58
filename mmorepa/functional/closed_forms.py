"""OREPA's folds as differentiable functions, with derivatives worked out by hand.

What ``autograd`` makes of the formulas in :mod:`.kernels` keeps every term of the
sum, each as large as the kernel, and walks through memory for each operation. Here a
fold is one matrix product and a few passes, its derivative two products and a few
passes, and the graph keeps nothing but references to the parameters. Kernels of one
shape are folded together, as one batch. On a CPU, :mod:`.compiled` does the work where
it can.

Where the operations themselves are followed (by compilers, tracers, ``torch.func``, or
a second derivative), the plain formulas run instead. The tests hold one against the
other.

``T`` stands for the channels between two composed convs, ``K = k²`` for the taps, ``m``
for the maps of the depthwise conv, ``n`` for the kernels of a batch, ``G`` for the
gradient of a kernel and ``s`` for the scale of a branch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils.checkpoint import checkpoint

from . import compiled
from .branch_sum import BranchSum

# By its newer name where there is one: the older then warns.
_is_traced_by_fx = getattr(
    _symbolic_trace, 'is_fx_symbolic_tracing', _symbolic_trace.is_fx_tracing
)


def fold_kernel(spec: BranchSum, *tensors: Tensor) -> Tensor:
    """Folds branches into one kernel, with a gradient.

    Args:
        spec (BranchSum): The sum of branches to fold.
        *tensors (Tensor): The parameters, in the order of ``spec.roles``.

    Returns:
        Tensor: Shape (O, Ig, k, k).
    """
    return fold_kernels(spec, [tensors])[0]


def fold_kernels(spec: BranchSum, sets: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """:func:`fold_kernel` for several sets of parameters of the same shapes.

    Args:
        spec (BranchSum): The sum of branches to fold.
        sets (Sequence[Sequence[Tensor]]): The parameters of each kernel. They have one
            dtype and device.

    Returns:
        list[Tensor]: Each of shape (O, Ig, k, k).
    """
    if is_followed():
        return [spec.kernel(*tensors) for tensors in sets]
    if spec.groups != 1:
        return [recomputed(spec.kernel, *tensors) for tensors in sets]
    return list(_ClosedForm.apply(spec, len(sets), *_flat(sets)))


def is_followed() -> bool:
    """Whether a compiler, a tracer or a transform follows the operations."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _is_traced_by_fx()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def recomputed(function: Callable[..., Tensor], *args) -> Tensor:
    """``function(*args)``, recomputed in the backward pass from its arguments.

    Args:
        function (Callable): Computed again in the backward pass.
        *args: Its arguments.
    """
    if is_followed() or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class _ClosedForm(torch.autograd.Function):
    """The kernels of a batch, one after another, and their derivative."""

    @staticmethod
    def forward(spec: BranchSum, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        kernels = compiled.call('fold', spec, tensors)
        return tuple(kernels or _fold_batch(spec, _split(tensors, count)))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.spec, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        # What a kernel that is not used does not depend on has no gradient.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        used = [grad for grad in grads if grad is not None]
        sets = _split(ctx.saved_tensors, ctx.count)
        own = [t for t, grad in zip(sets, grads) if grad is not None]
        rest = iter(_gradients(ctx.spec, own, used) if used else ())
        unused = [None] * len(ctx.spec.roles)
        found = _flat(
            unused if g is None else [next(rest) for _ in unused] for g in grads
        )
        needed = ctx.needs_input_grad[2:]
        return None, None, *(g if n else None for g, n in zip(found, needed))


def _gradients(
    spec: BranchSum, sets: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]
) -> list[Optional[Tensor]]:
    if torch.is_grad_enabled():
        # Where a graph of the derivative is asked for, it is that of the formulas.
        return _formula_gradients(spec, sets, grads)
    found = compiled.call('fold_gradients', spec, grads, _flat(sets))
    return found or _batch_gradients(spec, sets, grads)


def _formula_gradients(
    spec: BranchSum, sets: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]
) -> list[Optional[Tensor]]:
    trained = [t for t in _flat(sets) if t.requires_grad]
    kernels = [spec.kernel(*tensors) for tensors in sets]
    found = iter(torch.autograd.grad(kernels, trained, grads, create_graph=True))
    return [next(found) if t.requires_grad else None for t in _flat(sets)]


def _split(items: Sequence, count: int) -> list[Sequence]:
    size = len(items) // count
    return [items[start : start + size] for start in range(0, len(items), size)]


def _flat(sets: Iterable[Sequence]) -> list:
    return [item for own in sets for item in own]


# ---- in operations of PyTorch, as a batch ------------------------------------------


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    # A view of the only one.
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


class _Batch:
    """The parameters of n kernels in the shapes of the products that they enter.

    Attributes:
        scale (dict[str, Tensor]): By part, each of shape (n, O, 1, 1).
        origin (Tensor): Shape (n, O, I, K).
        first (Tensor): Shape (n, T, I), without the identity.
        second (Tensor): Shape (n, O·K, T).
        separable (Tensor): Shape (n, O, I, m).
        depthwise (Tensor): Shape (n, I, m, K).
        weights (Tensor): Those of the F filters, shape (n, O, F, I).
        filters (Tensor): Shape (n·O, F, K).
        filter_scales (Tensor): Shape (n, O, F).
    """

    def __init__(self, spec: BranchSum, sets: Sequence[Sequence[Tensor]]) -> None:
        outputs, inputs, size, _ = spec.shape
        n, taps = len(sets), size * size
        shapes = {
            'origin': (outputs, inputs, taps),
            'first': (-1, inputs),
            'second': (outputs * taps, -1),
            'separable': (outputs, inputs, -1),
            'depthwise': (inputs, -1, taps),
        }
        columns = dict(zip(spec.roles.values(), zip(*sets)))
        for role in shapes.keys() & columns.keys():
            setattr(self, role, _stack(columns[role]).reshape(n, *shapes[role]))
        scale = _stack(columns['scale']).view(n, -1, outputs, 1, 1)
        self.scale = {part: scale[:, row] for part, row in spec.rows.items()}
        self.has_identity = spec.has_identity
        if spec.filtered:
            own = zip(*(columns[name] for name in spec.filtered))
            weights = _stack([weight for kernel in own for weight in kernel])
            weights = weights.view(n, len(spec.filtered), outputs, inputs)
            self.weights = weights.transpose(1, 2)
            self.filters = spec.filters(like=scale, count=n)
            scales = [self.scale[name].flatten(1) for name in spec.filtered]
            self.filter_scales = torch.stack(scales, dim=2)

    def composed(self, by_tap: Tensor, matrix: Tensor) -> Tensor:
        """``by_tap · (matrix + E)`` with the identity E where there is one."""
        if self.has_identity:
            return torch.baddbmm(by_tap, by_tap, matrix)
        return torch.bmm(by_tap, matrix)


def _by_input(tensor: Tensor, scale: Optional[Tensor] = None) -> Tensor:
    """From (n, O, I, x) to (n·I, O, x), scaled on the way."""
    moved = tensor.transpose(1, 2)
    if scale is not None:
        out = torch.empty(moved.shape, dtype=tensor.dtype, device=tensor.device)
        moved = torch.mul(moved, scale.transpose(1, 2), out=out)
    return moved.reshape(-1, *moved.shape[2:])


def _fold_batch(spec: BranchSum, sets: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    b = _Batch(spec, sets)
    outputs, inputs, size, _ = spec.shape
    n, taps = len(sets), size * size
    if 'origin' in spec.rows:
        kernel = b.origin * b.scale['origin']
    else:
        kernel = sets[0][0].new_zeros(n, outputs, inputs, taps)
    if 'composed' in spec.rows:
        composed = b.composed(b.second, b.first).view(n, outputs, taps, inputs)
        kernel.addcmul_(composed.transpose(2, 3), b.scale['composed'])
    if 'separable' in spec.rows:
        product = torch.bmm(_by_input(b.separable), b.depthwise.flatten(0, 1))
        product = product.view(n, inputs, outputs, taps).transpose(1, 2)
        kernel.addcmul_(product, b.scale['separable'])
    if spec.filtered:
        filters = b.filters * b.filter_scales.reshape(n * outputs, -1, 1)
        weights = b.weights.reshape(n * outputs, -1, inputs).transpose(1, 2)
        kernel.view(n * outputs, inputs, taps).baddbmm_(weights, filters)
    return list(kernel.view(n, *spec.shape).unbind())


def _batch_gradients(
    spec: BranchSum, sets: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]
) -> list[Tensor]:
    """``Jᵀ·G`` for every parameter.

    The gradient of a kernel is ``s·G``, that of one factor of a product is ``s·G``
    times the other one, and that of ``s`` is the inner product of ``G`` and the
    branch's kernel, taken where it is cheap: ``⟨G, W₂·C⟩ = ⟨W₂, G·Cᵀ⟩``.
    """
    b = _Batch(spec, sets)
    outputs, inputs, size, _ = spec.shape
    n, taps = len(sets), size * size
    grad = _stack([g.reshape(outputs, inputs, taps) for g in grads])
    d, d_scale = {}, {}

    def inner(one: Tensor, other: Tensor) -> Tensor:
        """``⟨one[n, o], other[n, o]⟩``, shape (n, O)."""
        rows = one.reshape(n * outputs, 1, -1)
        return torch.bmm(rows, other.reshape(n * outputs, -1, 1)).view(n, outputs)

    if 'origin' in spec.rows:
        d['origin'] = grad * b.scale['origin']
        d_scale['origin'] = inner(b.origin, grad)
    if 'composed' in spec.rows:
        by_tap = grad.transpose(2, 3).reshape(n, outputs * taps, inputs)
        product = b.composed(by_tap, b.first.transpose(1, 2))
        d_scale['composed'] = inner(b.second, product)
        d['second'] = product.view(n, outputs, taps, -1) * b.scale['composed']
        scaled = by_tap.view(n, outputs, taps, -1) * b.scale['composed']
        d['first'] = torch.bmm(b.second.transpose(1, 2), scaled.view_as(by_tap))
    if 'separable' in spec.rows:
        scale, by_input = b.scale['separable'], _by_input(grad)
        product = torch.bmm(by_input, b.depthwise.flatten(0, 1).transpose(1, 2))
        product = product.view(n, inputs, outputs, -1).transpose(1, 2)
        d_scale['separable'] = (product * b.separable).sum(dim=(2, 3))
        d['separable'] = torch.mul(product, scale, out=torch.empty_like(b.separable))
        scaled = _by_input(b.separable, scale)
        d['depthwise'] = torch.bmm(scaled.transpose(1, 2), by_input)
        d['depthwise'] = d['depthwise'].view_as(b.depthwise)
    if spec.filtered:
        products = torch.bmm(b.filters, grad.flatten(0, 1).transpose(1, 2))
        products = products.view(n, outputs, -1, inputs)
        sums = (products * b.weights).sum(dim=3)
        d_weights = torch.empty_like(b.weights.transpose(1, 2)).transpose(1, 2)
        torch.mul(products, b.filter_scales[..., None], out=d_weights)
        for i, branch in enumerate(spec.filtered):
            d_scale[branch], d[branch] = sums[:, :, i], d_weights[:, :, i]
    rows = sorted(spec.rows, key=spec.rows.__getitem__)
    d['scale'] = torch.stack([d_scale[part] for part in rows], dim=1)
    return [
        d[role][i].reshape(t.shape)
        for i, own in enumerate(sets)
        for role, t in zip(spec.roles.values(), own)
    ]
