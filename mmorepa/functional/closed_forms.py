"""OREPA's fold as a differentiable function, with a hand-written derivative.

With the formulas in :mod:`.kernels`, ``autograd`` would keep every term of the sum, and
each term is as large as the kernel. Here the graph keeps only references to the
parameters. On a CPU, :mod:`.compiled` does the same work if it supports the inputs.

All tensors have the shape (O, K, I), with ``K = k²`` taps, which is the memory of a
kernel with channels last. With the letters of docs/mathematics.md::

    W[o,k,:] = s_0[o]·V[o,k,:]                            origin
             + s_1[o]·B[o,k,:] @ (C + E)                  composed
             + Σ_m s_2[o]·F[o,m,:]·G[m,k,:]               separable
             + Σ_b s_b[o]·f_b[o,k]·q_b[o,:]               filtered: average, …

With groups, each group has products of its own.

The plain formulas run instead if something records the operations: a compiler, a
tracer, ``torch.func`` or a second derivative. The tests compare both.
"""

from collections.abc import Sequence
from functools import cache
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace

from . import compiled
from .branch_sum import BranchSum
from .kernels import cached_constant, identity_1x1

# Use the newer name if it exists, because then the older one warns.
_is_traced_by_fx = getattr(
    _symbolic_trace, 'is_fx_symbolic_tracing', _symbolic_trace.is_fx_tracing
)


def fold_kernel(spec: BranchSum, *tensors: Tensor) -> Tensor:
    """Folds a sum of branches to a kernel, (O, Ig, k, k), with a gradient.

    Args:
        spec (BranchSum): The sum.
        *tensors (Tensor): The parameters of the sum, in the order of ``spec.roles``.

    Raises:
        ValueError: If a parameter has a wrong shape.
    """
    if is_being_traced():
        spec.check_shapes([t.shape for t in tensors])
        return spec.kernel(*tensors)
    _check_once(spec, *[t.shape for t in tensors])
    return _ClosedForm.apply(spec, *tensors)


@cache
def _check_once(spec: BranchSum, *shapes: torch.Size) -> None:
    spec.check_shapes(shapes)


def is_being_traced() -> bool:
    """Whether a compiler, a tracer or a transform records the operations."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _is_traced_by_fx()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class _ClosedForm(torch.autograd.Function):
    # With `setup_context`, PyTorch would inspect the signature in every call.
    @staticmethod
    def forward(ctx, spec: BranchSum, *tensors: Tensor) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(*tensors)
        if compiled.supports(spec, tensors):
            return compiled.fold(spec, tensors)
        return _as_kernel(_Terms(spec, tensors).fold(), spec)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        spec, tensors = ctx.spec, ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            # The caller wants a graph of the derivative: use the plain formulas.
            trained = [t for t, n in zip(tensors, needed) if n]
            kernel = spec.kernel(*tensors)
            grads = iter(torch.autograd.grad(kernel, trained, grad, create_graph=True))
            return None, *(next(grads) if n else None for n in needed)
        if compiled.supports(spec, (*tensors, grad)):
            gradients = compiled.fold_gradients(spec, grad, tensors)
        else:
            gradients = _Terms(spec, tensors).gradients(_channels_last(grad))
        return None, *(g if n else None for g, n in zip(gradients, needed))


def _channels_last(kernel: Tensor) -> Tensor:
    """(O, I, k, k) as (O, K, I), without a copy if it has channels last."""
    return kernel.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _as_kernel(kernel: Tensor, spec: BranchSum) -> Tensor:
    return kernel.unflatten(1, spec.shape[2:]).permute(0, 3, 1, 2)


class _Terms:
    """The parameters in the shapes in which they are multiplied.

    Attributes:
        scale (dict[str, Tensor]): The scale of each part, shape (O, 1, 1).
        origin (Tensor): Shape (O, K, I).
        first (Tensor): ``C + E``, shape (g, T/g, I).
        second (Tensor): Shape (g, O/g·K, T/g).
        separable (Tensor): Shape (g, O/g, m, I).
        depthwise (Tensor): Shape (g, m, K, I).
        weights (Tensor): The weights of the F filtered branches, shape (O, F, I).
        filters (Tensor): Shape (O, F, K).
    """

    def __init__(self, spec: BranchSum, tensors: Sequence[Tensor]) -> None:
        outputs, inputs, size, _ = spec.shape
        groups = spec.groups
        self.spec, self.tensors = spec, tensors
        self.shape = (outputs, size * size, inputs)
        p = dict(zip(spec.roles.values(), tensors))
        scale = p['scale'][:, :, None, None]
        self.scale = {part: scale[row] for part, row in spec.rows.items()}
        if 'origin' in p:
            self.origin = p['origin'].reshape(self.shape).contiguous()
        if 'first' in p:
            first = p['first'].flatten(1)
            if spec.has_identity:
                identity = cached_constant(identity_1x1, *first.shape, like=first)
                first = first + identity.flatten(1)
            self.first = first.reshape(groups, -1, inputs)
            hidden = self.first.shape[1]
            self.second = p['second'].reshape(groups, -1, hidden)
        if 'separable' in p:
            self.separable = p['separable'].unflatten(0, (groups, -1))
            depthwise = p['depthwise'].unflatten(2, (groups, inputs))
            self.depthwise = depthwise.permute(2, 0, 1, 3)
        if spec.filtered:
            weights = [p[part].flatten(1) for part in spec.filtered]
            self.weights = torch.stack(weights, dim=1)
            self.filters = spec.filters(like=scale).transpose(0, 1)

    def fold(self) -> Tensor:
        """The kernel, shape (O, K, I)."""
        scale = self.scale
        if 'origin' in scale:
            kernel = self.origin * scale['origin']
        else:
            kernel = self.tensors[0].new_zeros(self.shape)
        if 'composed' in scale:
            product = torch.bmm(self.second, self.first)
            kernel.addcmul_(product.view(self.shape), scale['composed'])
        if 'separable' in scale:
            product = torch.einsum('gomi,gmki->goki', self.separable, self.depthwise)
            kernel.addcmul_(product.reshape(self.shape), scale['separable'])
        if self.spec.filtered:
            scales = torch.cat([scale[part] for part in self.spec.filtered], dim=1)
            kernel.baddbmm_((self.filters * scales).mT, self.weights)
        return kernel

    def gradients(self, grad: Tensor) -> list[Tensor]:
        """``Jᵀ·G`` for every parameter. ``G`` is the kernel's gradient, (O, K, I).

        The gradient of a branch's kernel is ``s·G``. The gradient of one factor of a
        product is ``s·G`` times the other factor. The gradient of ``s`` is the inner
        product of ``G`` and the branch's kernel, as ``⟨G, B·C⟩ = ⟨B, G·Cᵀ⟩``.
        """
        spec, scale, groups = self.spec, self.scale, self.spec.groups
        d, d_scale = {}, {}

        def inner(one: Tensor, other: Tensor) -> Tensor:
            return (one * other).reshape(len(grad), -1).sum(dim=1)

        if 'origin' in scale:
            d['origin'] = grad * scale['origin']
            d_scale['origin'] = inner(self.origin, grad)
        if 'composed' in scale:
            by_group = (groups, -1, grad.shape[2])
            product = torch.bmm(grad.view(by_group), self.first.mT)
            d_scale['composed'] = inner(self.second, product)
            d['second'] = product.view(*self.shape[:2], -1) * scale['composed']
            scaled = (grad * scale['composed']).view(by_group)
            d['first'] = torch.bmm(self.second.mT, scaled)
        if 'separable' in scale:
            by_group = grad.unflatten(0, (groups, -1))
            product = torch.einsum('goki,gmki->gomi', by_group, self.depthwise)
            d_scale['separable'] = inner(self.separable, product)
            product = product.flatten(0, 1).contiguous()
            d['separable'] = product * scale['separable']
            scaled = (grad * scale['separable']).unflatten(0, (groups, -1))
            product = torch.einsum('gomi,goki->mkgi', self.separable, scaled)
            d['depthwise'] = product.contiguous()
        if spec.filtered:
            products = torch.bmm(self.filters, grad)
            sums = (products * self.weights).sum(dim=2)
            for i, part in enumerate(spec.filtered):
                d_scale[part] = sums[:, i]
                d[part] = products[:, i] * scale[part].flatten(1)
        parts = sorted(spec.rows, key=spec.rows.__getitem__)
        d['scale'] = torch.stack([d_scale[part] for part in parts])
        roles = spec.roles.values()
        return [d[role].reshape(t.shape) for role, t in zip(roles, self.tensors)]
