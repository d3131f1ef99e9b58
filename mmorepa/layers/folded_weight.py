"""The ``weight`` of a training form: a fold that can be read and written."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .reparam_conv import ReparamConv2d

NO_PARAMETER = (
    'the weight of a training form is folded from its branches and is no parameter. '
    'To start the branches from a kernel, call conv.start_from(kernel) or write to '
    'conv.weight.data in place; to have a parameter (for spectral norm, for example), '
    'deploy the model first, by mmorepa.switch_to_deploy(model) or deploy=True in '
    'conv_cfg'
)
NO_GRADIENT = (
    'conv.weight of a training form is folded anew each time, and keeps no gradient '
    'and no hooks: take those of the parameters of conv.branches'
)
_OWN = ('conv', 'whole', 'is_random', 'is_written')
_DRAWS = ('normal_', 'uniform_', 'kaiming_uniform_')
_SETS = ('zero_', 'fill_', '__setitem__')


class FoldedWeight(Tensor):
    """A fold: a tensor to compute with.

    To write to it in place (``normal_``, ``copy_``, ``weight[0] = …``, also through
    ``.data`` and views) starts the branches from the kernel that comes out, see
    :meth:`~mmorepa.layers.ReparamConv2d.start_from`. Random numbers, by which networks
    initialise every conv that they know, are an exception: they make the branches
    fresh. Then a conv with an initialisation of its own passes them over, and one whose
    branches cannot give just any kernel takes the norm of every row. What is computed
    from it is an ordinary tensor, and so are its copies, also in files, and
    :meth:`~torch.Tensor.detach`.

    ``requires_grad`` is that of the branches, to read and to set. Hooks and gradients
    are not kept, and asking for them is an error.

    Attributes:
        conv (ReparamConv2d): What is written to.
        whole (FoldedWeight): What this is a view of, with the whole kernel.
        is_random (bool): Whether random numbers have been written to ``whole``.
        is_written (bool): Whether anything has been written to ``whole``.
    """

    conv: 'ReparamConv2d'
    whole: 'FoldedWeight'
    is_random = False
    is_written = False

    @classmethod
    def of(cls, conv: 'ReparamConv2d', kernel: Tensor) -> 'FoldedWeight':
        """The kernel of a conv, in memory of its own."""
        # Outside of inference mode, whose tensors do not count what is written.
        with torch.inference_mode(False):
            weight = kernel.clone().as_subclass(cls)
        weight.conv, weight.whole = conv, weight
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Sequence[type],
        args: Sequence = (),
        kwargs: Optional[dict] = None,
    ) -> Any:
        name = getattr(func, '__name__', '')
        kwargs = kwargs or {}
        weights = list(_weights((args, tuple(kwargs.values()))))
        if isinstance(args[0] if args else None, cls) and hasattr(args[0], 'conv'):
            answer = args[0]._as_parameter(func, name, args[1:], kwargs)
            if answer is not NotImplemented:
                return answer
        is_rule = getattr(func, '__module__', '') == 'torch.nn.init'
        with torch._C.DisableTorchFunctionSubclass():
            versions = [weight._version for weight in weights]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_rule):
                found = func(*args, **kwargs)
            for weight, version in zip(weights, versions):
                if weight._version == version:
                    continue
                # As for a parameter that requires a gradient.
                if torch.is_grad_enabled() and weight.requires_grad and not is_rule:
                    raise TypeError(NO_PARAMETER)
                weight._written(name)
                weight.whole.is_written = True
            if name != 'detach':
                return _as_views(found, weights)
            # A detached one is taken for parameters of other modules. nn.Parameter()
            # asks for one of the same type, and marks it then.
            is_asked = sys._getframe(1).f_code is torch.nn.Parameter.__new__.__code__
            return found.as_subclass(cls) if is_asked else found

    def _as_parameter(
        self, func: Callable, name: str, args: tuple, kwargs: dict
    ) -> Any:
        """What a parameter would do that a tensor of the moment does not."""
        tensor = torch.Tensor
        if name == 'set_':
            raise TypeError(NO_PARAMETER)
        if name in ('register_hook', 'register_post_accumulate_grad_hook'):
            raise TypeError(NO_GRADIENT)
        if name not in ('__get__', '__set__', 'requires_grad_'):
            return NotImplemented
        branches = list(self.conv.branches.parameters())
        if func == tensor.grad.__get__:
            with torch._C.DisableTorchFunctionSubclass():
                if self.retains_grad:
                    return self.grad
            raise TypeError(NO_GRADIENT)
        if func == tensor.grad.__set__ and args[0] is None:
            for parameter in branches:
                parameter.grad = None
            return None
        if func == tensor.data.__set__ and self._holds(args[0]):
            return None  # As `conv.weight.data *= 2` ends.
        if self.whole is self and func == tensor.requires_grad.__get__:
            return any(parameter.requires_grad for parameter in branches)
        if func in (tensor.requires_grad_, tensor.requires_grad.__set__):
            value = next(iter((*args, *kwargs.values())), True)
            self.conv.branches.requires_grad_(value)
            self.conv._forget()
            return self if name == 'requires_grad_' else None
        if name == '__set__':
            raise TypeError(NO_PARAMETER)
        return NotImplemented

    def _holds(self, other: Any) -> bool:
        """Whether another one is this memory, and not a part of it."""
        is_one = isinstance(other, FoldedWeight) and other.whole is self.whole
        return is_one and other.shape == self.shape

    def __setattr__(self, name: str, value: Any) -> None:
        if name == '_is_param':
            self.__class__ = torch.nn.Parameter  # What nn.Parameter(conv.weight) makes.
            return
        if name not in _OWN and not hasattr(Tensor, name):
            raise TypeError(
                f'{name!r} would be lost, since conv.weight is folded anew each time: '
                "set it on the conv, or on conv.branches' parameters"
            )
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def _written(self, name: str) -> None:
        """Starts the branches from the written kernel."""
        whole, conv = self.whole, self.conv
        # Draws from a truncated distribution are drawn, and then worked upon.
        was_random = whole.is_random
        whole.is_random = name in _DRAWS or (was_random and name not in _SETS)
        if whole.is_random and not was_random and not conv.is_fresh():
            conv.redraw()
        if not (whole.is_random and conv.keeps_own_init and conv.folds_online):
            kernel = whole.detach().as_subclass(Tensor)
            conv.start_kernel_from(kernel, exactly=not whole.is_random)


def _weights(items: Iterable) -> Iterator[FoldedWeight]:
    """The folds among arguments."""
    for item in items:
        if isinstance(item, FoldedWeight):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _weights(item)


def _as_views(found: Any, weights: Sequence[FoldedWeight]) -> Any:
    """What a function returned, where it is a view of a fold to be written to."""
    if isinstance(found, (tuple, list)):
        views = [_as_views(item, weights) for item in found]
        changed = any(one is not other for one, other in zip(views, found))
        return type(found)(views) if changed else found
    if type(found) is Tensor:
        for weight in weights:
            if _share_memory(found, weight):
                view = found.as_subclass(FoldedWeight)
                view.conv, view.whole = weight.conv, weight.whole
                return view
    return found


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
