"""Online folding: kernel = f(branches), with a gradient and a cache."""

import weakref
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ..functional import compiled
from ..utils.autocast import no_autocast

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

    While it is held (:meth:`hold`), the kernel is a leaf of the graph: gradients
    stop at it, and are passed on to the branches all at once (:meth:`pull_back`).

    The cache belongs to one module: copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._entry: Optional[_Entry] = None
        self._leaf: Optional[nn.Parameter] = None
        self._is_held = False
        self._gradient_memory = _GradientMemory()

    def __call__(self, branches: nn.Module) -> Tensor:
        """Returns ``branches()``, the kernel, folded afresh only if need be.

        Args:
            branches (nn.Module): Its ``forward()`` maps its parameters and
                buffers to the kernel and does nothing else.

        Returns:
            Tensor: Shape (O, Ig, k, k), in the dtype of the parameters.
        """
        if torch.compiler.is_compiling():
            if self._is_held:
                return self._leaf
            # The compiler differentiates and fuses the formulas themselves.
            return _fold(branches, dict(_named_tensors(branches)))
        if torch.jit.is_tracing():
            # A trace records the formulas, and cannot call modules by stand-ins.
            return branches()
        leaf = self._leaf if self._is_held else None
        entry = self._entry
        if entry is None or not (
            entry.is_current(branches, leaf) or entry.renew(branches)
        ):
            self._entry = None
            if next(tensors_outside(branches), None) is not None:
                return _fold_as_it_is(branches)
            entry = self._entry = _Entry(branches)
        return entry.kernel(branches, leaf)

    def hold(self, branches: nn.Module) -> nn.Parameter:
        """Makes the kernel a leaf, brought up to date if the branches have changed.

        Args:
            branches (nn.Module): As for a call.

        Returns:
            nn.Parameter: The kernel, the same object at every call until the
            branches change their dtype or device.
        """
        like = next(branches.parameters())
        if self._leaf is None or not _is_like(self._leaf, like):
            self.release()
            with torch.no_grad():
                self._leaf = nn.Parameter(self(branches).clone())
        self._set_held(True)
        self(branches)
        return self._leaf

    def release(self) -> None:
        """Makes the kernel a function of the branches again."""
        self._set_held(False)

    def _set_held(self, is_held: bool) -> None:
        if self._is_held != is_held:
            self._is_held = is_held
            if self._entry is not None:
                self._entry.forget_kernel()

    def pull_back(self, branches: nn.Module) -> None:
        """Adds to the gradients of the branches what the held kernel's amounts to.

        ``dL/dθ += Jᵀ · dL/dW`` with ``J = dW/dθ``; the kernel's gradient is consumed.
        On a CPU the memory of the branches' gradients is used again in the next step.

        Args:
            branches (nn.Module): As for a call.
        """
        if self._leaf is None or self._leaf.grad is None:
            return
        if self._entry is None or not self._entry.is_of(branches):
            self._entry = _Entry(branches)
        tensors = self._entry.tensors()
        is_kept = compiled.is_available() and _has_closed_form(branches)
        unused = self._gradient_memory.take(tensors)
        grads = _fold_gradients(branches, tensors, self._leaf.grad, unused)
        for (name, tensor), grad in zip(tensors.items(), grads):
            if grad is None:
                continue
            if tensor.grad is not None:
                tensor.grad.add_(grad)
                continue
            if grad.stride() != tensor.stride():
                # As autograd would leave it: fused optimizers go through a parameter
                # and its gradient in the order of their storages.
                grad = torch.empty_like(tensor).copy_(grad)
            tensor.grad = grad
            if is_kept:
                self._gradient_memory.keep(name, grad)
        self._leaf.grad = None

    def clear(self) -> None:
        """Forgets the kernel, unless it is held, and the memory of gradients.

        A held one may be in use: it is written again only where a branch changes.
        """
        self._gradient_memory = _GradientMemory()
        if not self._is_held:
            self._entry = None

    def __reduce__(self) -> tuple:
        return OnlineFold, ()


class _GradientMemory:
    """The memory of gradients on a CPU, from one step to the next.

    Memory from the system is cleared, page by page, before use.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def keep(self, name: str, grad: Tensor) -> None:
        """Notes the memory of a gradient that others have now.

        Args:
            name (str): The parameter's.
            grad (Tensor): The gradient.
        """
        if grad.device.type == 'cpu' and grad.dtype not in _HALF_DTYPES:
            # Another tensor on the same memory: that one may be given other memory.
            self._kept[name] = grad.detach()

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gives away what is kept, if nobody else has any of it any more.

        Args:
            tensors (dict[str, Tensor]): The parameters by name.

        Returns:
            dict[str, Tensor]: Memory for the gradients of some of them, contiguous.
        """
        kept, self._kept = self._kept, {}
        fitting = {
            name: memory
            for name, memory in kept.items()
            if name in tensors
            and _is_like(memory, tensors[name])
            and memory.shape == tensors[name].shape
            and memory.is_contiguous()
        }
        is_free = fitting and compiled.are_unshared(list(fitting.values()))
        return fitting if is_free else {}


class _Place(NamedTuple):
    """Where a module keeps a tensor."""

    full_name: str
    store: dict
    name: str
    tensor: weakref.ref
    is_counted: bool  # whether PyTorch counts its changes


class Watch:
    """The state of all parameters and buffers of a module at one time.

    Args:
        module (nn.Module): The module.
    """

    def __init__(self, module: nn.Module) -> None:
        # Weak, as is what is known of the tensors: `module` may own this.
        self._modules = [weakref.ref(child) for child in module.modules()]
        self._places = [
            _Place(
                f'{prefix}.{name}'.lstrip('.'),
                store,
                name,
                weakref.ref(tensor),
                # Not those that were made in inference mode.
                not tensor.is_inference(),
            )
            for prefix, child in module.named_modules()
            for store in (child._parameters, child._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        tensors = self.tensors().values()
        is_meta = next(iter(tensors)).is_meta
        samples = [] if is_meta else [_sample(t) for t in tensors]
        # By their number of dimensions, so that each kind can be read at once.
        self._samples = [[s for s in samples if s.dim() == n] for n in (1, 2)]
        self._states = self._read_states(module)
        self._content = self._read_samples()

    def is_current(self, module: nn.Module) -> bool:
        """Whether the module is still in that state, and still the same.

        Args:
            module (nn.Module): What is in the place of the module now.
        """
        return self._read_states(module) == self._states and all(
            map(torch.equal, self._read_samples(), self._content)
        )

    def renew(self, module: nn.Module) -> bool:
        """Watches the present state from now on, which costs less than a new watch.

        Args:
            module (nn.Module): As for :meth:`is_current`.

        Returns:
            bool: Whether that is possible: not where tensors or modules were exchanged.
        """
        states = self._read_states(module)
        if states is None or self._states is None:
            return False
        if any(new[0] != old[0] for new, old in zip(states, self._states)):
            return False
        self._states = states
        self._content = self._read_samples()
        return True

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is this module that is watched."""
        return self._modules[0]() is module

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers by name."""
        return {
            place.full_name: place.store[place.name]
            for place in self._places
            if place.name in place.store
        }

    def _read_states(self, module: nn.Module) -> Optional[list[tuple]]:
        """Where tensors are and how often they changed; None if any was exchanged."""
        if [reference() for reference in self._modules] != list(module.modules()):
            return None
        states = []
        for _, store, name, reference, is_counted in self._places:
            # None where pruning or a parametrisation took a parameter away. `is`,
            # since a new tensor may live where a freed one did.
            tensor = store.get(name)
            if tensor is None or reference() is not tensor:
                return None
            version = tensor._version if is_counted else None
            states.append((tensor.data_ptr(), version))
        return states

    def _read_samples(self) -> list[Tensor]:
        # As bytes, of which a NaN equals itself.
        return [torch.cat(s).view(torch.uint8) for s in self._samples if s]


class _Entry(Watch):
    """The kernel of one state of the branches.

    Args:
        branches (nn.Module): What the kernel is folded from.
    """

    def __init__(self, branches: nn.Module) -> None:
        super().__init__(branches)
        self._are_trained = self._which_are_trained()
        self._kernel: Optional[Tensor] = None

    def is_current(self, branches: nn.Module, leaf: Optional[nn.Parameter]) -> bool:
        """Whether the branches are in that state still, as far as it matters.

        Args:
            branches (nn.Module): What is in their place now.
            leaf (nn.Parameter, optional): As for :meth:`kernel`.
        """
        if not super().is_current(branches):
            return False
        # The values of a held kernel do not depend on what is trained.
        return leaf is not None or self._which_are_trained() == self._are_trained

    def renew(self, branches: nn.Module) -> bool:
        """Goes over to the present state of the branches, if that is possible.

        Args:
            branches (nn.Module): What is in their place now.
        """
        self.forget_kernel()
        if not super().renew(branches):
            return False
        self._are_trained = self._which_are_trained()
        return True

    def forget_kernel(self) -> None:
        """Has the kernel folded anew when it is asked for."""
        self._kernel = None

    def _which_are_trained(self) -> list[bool]:
        return [tensor.requires_grad for tensor in self.tensors().values()]

    def kernel(self, branches: nn.Module, leaf: Optional[nn.Parameter]) -> Tensor:
        """The kernel, with a gradient where that is asked for.

        Args:
            branches (nn.Module): As before.
            leaf (nn.Parameter, optional): Where the kernel is written, and then has no
                gradient to the branches.
        """
        with_grad = any(self._are_trained) and torch.is_grad_enabled()
        if leaf is not None and self._kernel is None:
            self._kernel = _fold_fast(branches, self.tensors(), leaf)
        if self._kernel is None or (with_grad and not self._kernel.requires_grad):
            # Outside of inference mode, since a kernel made inside of it could not
            # serve a later pass that needs a gradient with respect to its input.
            with torch.inference_mode(False), torch.set_grad_enabled(with_grad):
                names, tensors = zip(*self.tensors().items())
                self._kernel = _Fold.apply(branches, names, *tensors)
        return self._kernel if with_grad else self._kernel.detach()


def _version(tensor: Tensor) -> Optional[int]:
    # Tensors made in inference mode are not counted.
    return None if tensor.is_inference() else tensor._version


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
        ctx.versions = [_version(t) for t in tensors]
        return _fold_fast(branches, dict(zip(names, tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        if [_version(t) for t in ctx.tensors] != ctx.versions:
            raise RuntimeError(
                'a parameter of a re-parameterised conv was changed in place between '
                'the forward and the backward pass; run backward() before '
                'the optimizer step (or whatever changed it)'
            )
        tensors = dict(zip(ctx.names, ctx.tensors))
        return None, None, *_fold_gradients(ctx.branches, tensors, grad)


def _fold(branches: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """The kernel by the plain formulas, which can be differentiated.

    Computed in float32 or better whatever the context says: the sum of several
    branches loses digits in half precision, and costs nothing compared with the
    convolution itself.
    """
    first = next(iter(tensors.values()))
    with no_autocast(first.device.type):
        kernel = functional_call(branches, _widened(tensors), (), tie_weights=False)
    return kernel.to(first.dtype)


def _fold_fast(
    branches: nn.Module, tensors: dict[str, Tensor], out: Optional[Tensor] = None
) -> Tensor:
    """The kernel in closed form where there is one; no graph is built.

    Args:
        branches (nn.Module): What the kernel is folded from.
        tensors (dict[str, Tensor]): Their parameters and buffers.
        out (Tensor, optional): Where to write it. Defaults to None.
    """
    if _has_closed_form(branches):
        if out is not None and out.dtype not in _HALF_DTYPES:
            return branches.fold(_widened(tensors), out)
        kernel = branches.fold(_widened(tensors))
    else:
        with torch.no_grad():
            kernel = _fold(branches, tensors)
    with torch.no_grad():
        if out is not None:
            return out.copy_(kernel)
        return kernel.to(next(iter(tensors.values())).dtype)


def _fold_gradients(
    branches: nn.Module,
    tensors: dict[str, Tensor],
    grad: Tensor,
    out: Optional[dict[str, Tensor]] = None,
) -> list[Optional[Tensor]]:
    """``Jᵀ · grad`` for every tensor that is trained, None for the others.

    What ``out`` has may be written there.
    """
    if _has_closed_form(branches):
        wide = _widened({'': grad, **tensors})
        found = branches.fold_gradients(wide, wide.pop(''), out)
        return [
            found[name].to(t.dtype) if t.requires_grad else None
            for name, t in tensors.items()
        ]
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors.values()]
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    # backward() may be called inside of autocast, as the forward pass was.
    with torch.enable_grad(), no_autocast(grad.device.type):
        kernel = _fold(branches, dict(zip(tensors, leaves)))
        grads = iter(torch.autograd.grad(kernel, needed, grad, allow_unused=True))
    return [next(grads) if leaf.requires_grad else None for leaf in leaves]


def _has_closed_form(branches: nn.Module) -> bool:
    """Whether the branches' own ``fold`` and ``fold_gradients`` can be called."""
    # Which take the parameters themselves, not what a parametrisation makes of others.
    # Looked for where it is kept: to miss an attribute of a module takes long.
    return getattr(branches, 'has_closed_form', False) and not any(
        'parametrizations' in module._modules for module in branches.modules()
    )


def _widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.float() if t.dtype in _HALF_DTYPES else t for name, t in tensors.items()
    }


def _fold_as_it_is(branches: nn.Module) -> Tensor:
    """The kernel of branches whose tensors cannot be watched or exchanged."""
    device = next(tensors_outside(branches)).device
    with no_autocast(device.type):
        return branches()


def tensors_outside(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a wrapper put in the place of parameters: FSDP, or pruning."""
    for child in module.modules():
        yield from (v for v in vars(child).values() if isinstance(v, Tensor))


def _is_like(tensor: Tensor, other: Tensor) -> bool:
    return (tensor.dtype, tensor.device) == (other.dtype, other.device)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _sample(tensor: Tensor) -> Tensor:
    """A view of up to 64 elements, in fours that are spread over the storage.

    Each four are read together: of a network that does not fit the cache, it is the
    places that cost time, not the elements.
    """
    flat = tensor.detach()
    # From the first element to the last: an expanded tensor has fewer in storage
    # than its shape says.
    extent = 1 + sum((n - 1) * step for n, step in zip(flat.shape, flat.stride()))
    extent = extent if flat.numel() else 0
    if extent <= 64:
        return flat.as_strided((extent,), (1,), flat.storage_offset())
    fours = flat.as_strided((16, 4), ((extent - 4) // 15, 1), flat.storage_offset())
    return fours
