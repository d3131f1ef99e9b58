"""Online folding: kernel = f(branches), with a gradient and a cache."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

_HALF_DTYPES = (torch.float16, torch.bfloat16)


class OnlineFold:
    """Folds the branches of one conv, at most once per state of their parameters.

    The kernel is kept and served again until a parameter changes. A change is
    seen whichever way it came: an in-place operation (optimizer step,
    ``load_state_dict``), another tensor or another storage (``.to()``,
    ``functional_call``), or a write through ``.data`` (how EMA hooks and mean
    teachers update parameters), which PyTorch does not count and which is found
    by comparing a sample of every tensor.

    A kernel that carries a gradient may be used, and differentiated, any number
    of times: a conv that a head applies to five pyramid levels folds once.

    The cache belongs to one module: copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._entry: Optional[_Entry] = None

    def __call__(self, branches: nn.Module) -> Tensor:
        """Returns ``branches()``, the kernel, folded afresh only if need be.

        Args:
            branches (nn.Module): Its ``forward()`` maps its parameters and
                buffers to the kernel and does nothing else.

        Returns:
            Tensor: Shape (O, Ig, k, k), in the dtype of the parameters.
        """
        if torch.compiler.is_compiling():
            # The compiler differentiates and fuses the formulas themselves.
            return _fold(branches, _named_tensors(branches))
        tensors = _named_tensors(branches)
        with_grad = torch.is_grad_enabled() and any(
            t.requires_grad for t in tensors.values()
        )
        entry = self._entry
        if entry is None or not entry.serves(tensors, with_grad):
            entry = _Entry.of(branches, tensors, with_grad)
            self._entry = entry
        return entry.kernel if with_grad else entry.kernel.detach()

    def clear(self) -> None:
        """Forgets the kernel."""
        self._entry = None

    def __deepcopy__(self, memo: dict) -> 'OnlineFold':
        return OnlineFold()

    def __reduce__(self) -> tuple:
        return OnlineFold, ()


class _State(NamedTuple):
    """What shows that a tensor is still the same, with the same content."""

    tensor: weakref.ref
    pointer: int
    version: int
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> '_State':
        return cls(
            weakref.ref(tensor),
            tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
            tensor.requires_grad,
        )


class _Entry(NamedTuple):
    kernel: Tensor
    states: list[_State]
    samples: list[Tensor]
    content: Optional[Tensor]

    @classmethod
    def of(
        cls, branches: nn.Module, tensors: dict[str, Tensor], with_grad: bool
    ) -> '_Entry':
        # Outside of inference mode, since a kernel made inside of it could not
        # serve a later pass that needs a gradient with respect to its input.
        with torch.inference_mode(False):
            states = [_State.of(t) for t in tensors.values()]
            samples = [_sample(t) for t in tensors.values()]
            content = _content(samples)
            if with_grad:
                kernel = _Fold.apply(branches, tuple(tensors), *tensors.values())
            else:
                with torch.no_grad():
                    kernel = _fold(branches, tensors)
        return cls(kernel, states, samples, content)

    def serves(self, tensors: dict[str, Tensor], with_grad: bool) -> bool:
        if with_grad and not self.kernel.requires_grad:
            return False
        if len(tensors) != len(self.states):
            return False
        for tensor, state in zip(tensors.values(), self.states):
            # `is`, since a new tensor may live where a freed one did.
            if state.tensor() is not tensor or state[1:] != _State.of(tensor)[1:]:
                return False
        return self.content is None or torch.equal(_content(self.samples), self.content)


class _Fold(torch.autograd.Function):
    """The fold as one node of the graph.

    Saves nothing but references to the parameters: the terms of the sum, each as
    large as the kernel, are computed again in the backward pass. Nothing is freed
    by a backward pass either, so that one kernel can serve several of them.
    """

    @staticmethod
    def forward(
        ctx, branches: nn.Module, names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.branches, ctx.names, ctx.tensors = branches, names, tensors
        ctx.versions = [t._version for t in tensors]
        return _fold(branches, dict(zip(names, tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        if [t._version for t in ctx.tensors] != ctx.versions:
            raise RuntimeError(
                'a parameter of a re-parameterised conv was changed in place between '
                'the forward and the backward pass; run backward() before '
                'the optimizer step (or whatever changed it)'
            )
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in ctx.tensors]
        with torch.enable_grad():
            kernel = _fold(ctx.branches, dict(zip(ctx.names, leaves)))
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(kernel, needed, grad, allow_unused=True))
        return (
            None,
            None,
            *(next(grads) if leaf.requires_grad else None for leaf in leaves),
        )


def _fold(branches: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """The kernel, computed in float32 or better whatever the context says.

    The sum of several branches loses digits in half precision, and costs nothing
    compared with the convolution itself.
    """
    first = next(iter(tensors.values()))
    with _no_autocast(first.device.type):
        if first.dtype not in _HALF_DTYPES:
            return functional_call(branches, tensors, ())
        wide = {name: t.float() for name, t in tensors.items()}
        return functional_call(branches, wide, ()).to(first.dtype)


@contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    with torch.autocast(device_type, enabled=False):
        yield


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _sample(tensor: Tensor) -> Tensor:
    """A view of up to about 64 elements, spread over the storage of ``tensor``."""
    flat = tensor.detach()
    count = min(flat.numel(), 64)
    step = flat.numel() // max(count, 1)
    return flat.as_strided((count,), (max(step, 1),), flat.storage_offset())


def _content(samples: list[Tensor]) -> Optional[Tensor]:
    if samples[0].is_meta:
        return None
    return torch.cat([s.float() for s in samples])
