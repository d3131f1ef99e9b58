"""OREPA's folds as differentiable functions, with derivatives worked out by hand.

What ``autograd`` makes of the formulas in :mod:`.kernels` keeps every term of the
sum, each as large as the kernel, and walks through memory for each operation. Here a
fold is one matrix product and a few passes, its derivative two products and a few
passes, and the graph keeps nothing but references to the parameters. Kernels of one
shape are folded together, as one batch. On a CPU, :mod:`.compiled` does the work where
it can.

Where somebody follows the operations themselves (compilers, tracers, ``torch.func``,
a second derivative), the plain formulas run instead. The tests hold one against the
other.

``T`` stands for the channels between two composed convs, ``K = k²`` for the taps, ``m``
for the maps of the depthwise conv, ``n`` for the kernels of a batch, ``G`` for the
gradient of a kernel and ``s`` for the scale of a branch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils.checkpoint import checkpoint

from . import compiled
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

# By its newer name where there is one: the older then warns.
_is_traced_by_fx = getattr(
    _symbolic_trace, 'is_fx_symbolic_tracing', _symbolic_trace.is_fx_tracing
)

# Branches whose kernels are one weight for each input times a filter.
_FILTERED = ('average', 'frequency', 'pointwise')


# The parameters of each branch, with the part that each plays in the closed form.
_PARAMETERS = {
    'origin': {'weight_origin': 'origin'},
    'average': {'weight_average': 'average'},
    'frequency': {'weight_frequency': 'frequency'},
    'pointwise_kxk': {
        'weight_pointwise_kxk_1': 'first',
        'weight_pointwise_kxk_2': 'second',
    },
    'pointwise': {'weight_pointwise': 'pointwise'},
    'depthwise_separable': {
        'weight_depthwise': 'depthwise',
        'weight_separable': 'separable',
    },
    'pointwise_pointwise': {'weight_first': 'first', 'weight_second': 'second'},
}
# The rows of the scale have the names of the branches, but for these.
_ROWS = {
    'pointwise_kxk': 'composed',
    'pointwise_pointwise': 'composed',
    'depthwise_separable': 'separable',
}


@dataclass(frozen=True)
class Fold:
    """A sum of branches, ``K = Σ_b s_b · K_b`` (paper, section 3.2).

    Args:
        branches (tuple[str, ...]): In the order of the rows of ``scale``.
        shape (tuple[int, ...]): Of the kernel, (O, Ig, k, k).
        groups (int): g. Defaults to 1.
        expansion (int): m. Defaults to 8.

    Attributes:
        roles (dict[str, str]): The parameters by name, in order, with the part that
            each plays.
    """

    branches: tuple[str, ...]
    shape: tuple[int, ...]
    groups: int = 1
    expansion: int = 8

    def __post_init__(self) -> None:
        own = {k: v for branch in self.branches for k, v in _PARAMETERS[branch].items()}
        object.__setattr__(self, 'roles', {'scale': 'scale', **own})

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

    def parts(self, tensors: Sequence[Tensor]) -> compiled.Branches:
        """The parameters as the closed forms take them."""
        outputs, inputs, size, _ = self.shape
        scale, *_ = tensors
        identity = filters = None
        if 'pointwise_kxk' in self.branches:
            identity = constant(identity_1x1, inputs, inputs, like=scale)
        if 'frequency' in self.branches:
            filters = constant(frequency_prior, outputs, size, like=scale)
        return compiled.Branches(
            compiled.Parameters(**dict(zip(self.roles.values(), tensors))),
            {_ROWS.get(b, b): row for row, b in enumerate(self.branches)},
            identity,
            filters,
        )


def fold_kernel(fold: Fold, *tensors: Tensor) -> Tensor:
    """Folds branches into one kernel, with a gradient.

    Args:
        fold (Fold): What is folded, and how.
        *tensors (Tensor): The parameters, in the order of ``fold.roles``.

    Returns:
        Tensor: Shape (O, Ig, k, k).
    """
    return fold_kernels(fold, [tensors])[0]


def fold_kernels(fold: Fold, sets: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """:func:`fold_kernel` for several sets of parameters of the same shapes.

    Args:
        fold (Fold): What is folded, and how.
        sets (Sequence[Sequence[Tensor]]): The parameters of each kernel. They have one
            dtype and device.

    Returns:
        list[Tensor]: Each of shape (O, Ig, k, k).
    """
    if is_followed():
        return [fold.kernel(*tensors) for tensors in sets]
    if fold.groups != 1:
        return [recomputed(fold.kernel, *tensors) for tensors in sets]
    return list(_ClosedForm.apply(fold, len(sets), *(t for s in sets for t in s)))


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
    """``function(*args)``, of which the graph keeps the arguments alone.

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
    def forward(fold: Fold, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts = [fold.parts(own) for own in _split(tensors, count)]
        if not compiled.takes(parts[0], tensors[0]):
            return _fold_batch(fold, parts)
        kernels = [tensors[0].new_empty(fold.shape) for _ in parts]
        if all(compiled.fold(p, kernel) for p, kernel in zip(parts, kernels)):
            return tuple(kernels)
        return _fold_batch(fold, parts)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.fold, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        # What a kernel that is not used does not depend on has no gradient.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        sets = _split(ctx.saved_tensors, ctx.count)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        needed = _split(ctx.needs_input_grad[2:], ctx.count)
        # Where a graph of the derivative is asked for, it is that of the formulas.
        derive = _formula_gradients if torch.is_grad_enabled() else _gradients
        found: list = [[None] * len(own) for own in sets]
        if used:
            derived = derive(
                ctx.fold,
                [sets[i] for i in used],
                [grads[i] for i in used],
                [needed[i] for i in used],
            )
            for i, gradients in zip(used, derived):
                found[i] = [g if n else None for g, n in zip(gradients, needed[i])]
        return None, None, *(gradient for own in found for gradient in own)


def _split(items: Sequence, count: int) -> list[Sequence]:
    size = len(items) // count
    return [items[start : start + size] for start in range(0, len(items), size)]


def _formula_gradients(
    fold: Fold,
    sets: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    needed: Sequence[Sequence[bool]],
) -> list[list[Optional[Tensor]]]:
    flat = [tensor for own in sets for tensor in own]
    flags = [n for own in needed for n in own]
    found = iter(
        torch.autograd.grad(
            [fold.kernel(*own) for own in sets],
            [tensor for tensor, n in zip(flat, flags) if n],
            grads,
            create_graph=True,
            allow_unused=True,
        )
    )
    return _split([next(found) if n else None for n in flags], len(sets))


def _gradients(
    fold: Fold,
    sets: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    needed: Sequence[Sequence[bool]],
) -> list[Sequence[Tensor]]:
    """``Jᵀ·G`` for every parameter.

    The gradient of a kernel is ``s·G``, that of one factor of a product is ``s·G``
    times the other one, and that of ``s`` is the inner product of ``G`` and the
    branch's kernel, taken where it is cheap: ``⟨G, W₂·C⟩ = ⟨W₂, G·Cᵀ⟩``.
    """
    parts = [fold.parts(own) for own in sets]
    if compiled.takes(parts[0], grads[0]):
        # Laid out as the parameters, as autograd would leave them.
        found = [[torch.empty_like(t) for t in own] for own in sets]
        if all(
            compiled.fold_gradients(part, grad.contiguous(), fold.parts(own).parameters)
            for part, grad, own in zip(parts, grads, found)
        ):
            return found
    return _batch_gradients(fold, parts, grads)


# ---- in operations of PyTorch, as a batch ------------------------------------------


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    # A view of the only one.
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


@dataclass
class _Batch:
    """The parameters of n kernels in the shapes of the products that they enter."""

    rows: dict[str, int]
    scale: Tensor  # (n, branches, O)
    origin: Optional[Tensor]  # (n, O, I, K)
    first: Optional[Tensor]  # (n, T, I)
    second: Optional[Tensor]  # (n, O·K, T)
    separable: Optional[Tensor]  # (n, O, I, m)
    depthwise: Optional[Tensor]  # (n, I, m, K)
    filtered: tuple[str, ...]
    weights: Optional[Tensor]  # (n, O, F, I): the weights of filters
    filters: Optional[Tensor]  # (n·O, F, K)
    has_identity: bool

    @classmethod
    def of(cls, fold: Fold, parts: Sequence[compiled.Branches]) -> '_Batch':
        outputs, inputs, size, _ = fold.shape
        n, taps = len(parts), size * size

        def stacked(name: str, *shape: int) -> Optional[Tensor]:
            tensors = [getattr(part.parameters, name) for part in parts]
            return None if tensors[0] is None else _stack(tensors).reshape(n, *shape)

        filtered = tuple(b for b in _FILTERED if b in parts[0].rows)
        weights = filters = None
        if filtered:
            weights = [getattr(p.parameters, b) for p in parts for b in filtered]
            weights = _stack(weights).view(n, len(filtered), outputs, inputs)
            weights = weights.transpose(1, 2)
            filters = constant(
                _filters, n, outputs, size, filtered, like=parts[0].parameters.scale
            )
        return cls(
            parts[0].rows,
            stacked('scale', -1, outputs),
            stacked('origin', outputs, inputs, taps),
            stacked('first', -1, inputs),
            stacked('second', outputs * taps, -1),
            stacked('separable', outputs, inputs, -1),
            stacked('depthwise', inputs, -1, taps),
            filtered,
            weights,
            filters,
            parts[0].identity is not None,
        )

    def scale_of(self, branch: str) -> Tensor:
        """Shape (n, O, 1, 1)."""
        return self.scale[:, self.rows[branch], :, None, None]

    @property
    def filter_scales(self) -> Tensor:
        """Shape (n, O, F)."""
        rows = [self.rows[branch] for branch in self.filtered]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return self.scale[:, rows[0] : rows[-1] + 1].transpose(1, 2)
        return torch.stack([self.scale[:, row] for row in rows], dim=2)

    def composed(self, by_tap: Tensor, matrix: Tensor) -> Tensor:
        """``by_tap · (matrix + E)`` with the identity E where there is one."""
        if self.has_identity:
            return torch.baddbmm(by_tap, by_tap, matrix)
        return torch.bmm(by_tap, matrix)


def _filters(
    count: int,
    channels: int,
    size: int,
    filtered: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    ones = torch.ones(channels, 1, 1, 1, dtype=dtype, device=device)
    filter_of = {
        'average': lambda: average_kernel(ones, size),
        'frequency': lambda: frequency_prior(channels, size, dtype, device),
        'pointwise': lambda: embed_1x1(ones, size),
    }
    kernels = [filter_of[branch]().reshape(channels, -1) for branch in filtered]
    return torch.stack(kernels, dim=1).repeat(count, 1, 1)


def _by_input(tensor: Tensor, scale: Optional[Tensor] = None) -> Tensor:
    """From (n, O, I, x) to (n·I, O, x), scaled on the way."""
    moved = tensor.transpose(1, 2)
    if scale is not None:
        out = torch.empty(moved.shape, dtype=tensor.dtype, device=tensor.device)
        moved = torch.mul(moved, scale.transpose(1, 2), out=out)
    return moved.reshape(-1, *moved.shape[2:])


def _fold_batch(fold: Fold, parts: Sequence[compiled.Branches]) -> tuple[Tensor, ...]:
    b = _Batch.of(fold, parts)
    outputs, inputs, size, _ = fold.shape
    n, taps = len(parts), size * size
    if b.origin is not None:
        kernel = b.origin * b.scale_of('origin')
    else:
        kernel = b.scale.new_zeros(n, outputs, inputs, taps)
    if b.second is not None:
        composed = b.composed(b.second, b.first).view(n, outputs, taps, inputs)
        kernel.addcmul_(composed.transpose(2, 3), b.scale_of('composed'))
    if b.separable is not None:
        product = torch.bmm(_by_input(b.separable), b.depthwise.flatten(0, 1))
        product = product.view(n, inputs, outputs, taps).transpose(1, 2)
        kernel.addcmul_(product, b.scale_of('separable'))
    if b.weights is not None:
        filters = b.filters * b.filter_scales.reshape(n * outputs, -1, 1)
        weights = b.weights.reshape(n * outputs, -1, inputs).transpose(1, 2)
        kernel.view(n * outputs, inputs, taps).baddbmm_(weights, filters)
    return kernel.view(n, *fold.shape).unbind()


def _batch_gradients(
    fold: Fold, parts: Sequence[compiled.Branches], grads: Sequence[Tensor]
) -> list[list[Tensor]]:
    b = _Batch.of(fold, parts)
    outputs, inputs, size, _ = fold.shape
    n, taps = len(parts), size * size
    grad = _stack([g.reshape(outputs, inputs, taps) for g in grads])
    d, d_scale = {}, {}

    def inner(one: Tensor, other: Tensor) -> Tensor:
        """``⟨one[n, o], other[n, o]⟩``, shape (n, O)."""
        rows = one.reshape(n * outputs, 1, -1)
        return torch.bmm(rows, other.reshape(n * outputs, -1, 1)).view(n, outputs)

    if b.origin is not None:
        d['origin'] = grad * b.scale_of('origin')
        d_scale['origin'] = inner(b.origin, grad)
    if b.second is not None:
        by_tap = grad.transpose(2, 3).reshape(n, outputs * taps, inputs)
        product = b.composed(by_tap, b.first.transpose(1, 2))
        d_scale['composed'] = inner(b.second, product)
        d['second'] = product.view(n, outputs, taps, -1) * b.scale_of('composed')
        scaled = by_tap.view(n, outputs, taps, -1) * b.scale_of('composed')
        d['first'] = torch.bmm(b.second.transpose(1, 2), scaled.view_as(by_tap))
    if b.separable is not None:
        scale, by_input = b.scale_of('separable'), _by_input(grad)
        product = torch.bmm(by_input, b.depthwise.flatten(0, 1).transpose(1, 2))
        product = product.view(n, inputs, outputs, -1).transpose(1, 2)
        d_scale['separable'] = (product * b.separable).sum(dim=(2, 3))
        d['separable'] = torch.mul(product, scale, out=torch.empty_like(b.separable))
        scaled = _by_input(b.separable, scale)
        d['depthwise'] = torch.bmm(scaled.transpose(1, 2), by_input)
        d['depthwise'] = d['depthwise'].view_as(b.depthwise)
    if b.weights is not None:
        products = torch.bmm(b.filters, grad.flatten(0, 1).transpose(1, 2))
        products = products.view(n, outputs, -1, inputs)
        sums = (products * b.weights).sum(dim=3)
        d_weights = torch.empty_like(b.weights.transpose(1, 2)).transpose(1, 2)
        torch.mul(products, b.filter_scales[..., None], out=d_weights)
        for i, branch in enumerate(b.filtered):
            d_scale[branch], d[branch] = sums[:, :, i], d_weights[:, :, i]
    rows = sorted(b.rows, key=b.rows.__getitem__)
    d['scale'] = torch.stack([d_scale[branch] for branch in rows], dim=1)
    return [
        [
            d[role][i].reshape(getattr(part.parameters, role).shape)
            for role in fold.roles.values()
        ]
        for i, part in enumerate(parts)
    ]
