"""The ``weight`` of a training form: a fold that can be read and written."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .reparam_conv import ReparamConv2d

NO_PARAMETER = (
    'the weight of a training form is folded from its branches and is no parameter. '
    'To start the branches from a kernel, call conv.start_from(kernel) or write to '
    'conv.weight.data in place; to have a parameter, deploy the model first, by '
    'mmorepa.switch_to_deploy(model) or deploy=True in conv_cfg'
)
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
    from it is an ordinary tensor, :meth:`~torch.Tensor.detach` included.

    Attributes:
        conv (ReparamConv2d): What is written to.
        whole (FoldedWeight): What this is a view of, with the whole kernel.
        is_random (bool): Whether random numbers have been written to ``whole``.
    """

    conv: 'ReparamConv2d'
    whole: 'FoldedWeight'
    is_random = False

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
        if isinstance(args[0] if args else None, cls):
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
            # A detached one is taken for parameters of other modules.
            return found if name == 'detach' else _as_views(found, weights)

    def _as_parameter(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
        """What a parameter would do that a tensor of the moment does not."""
        tensor = torch.Tensor
        if name == 'set_':
            raise TypeError(NO_PARAMETER)
        if func in (tensor.grad.__get__, tensor.grad.__set__) or name in _HOOKS:
            raise TypeError(NO_GRADIENT)
        if func is tensor.data.__set__ and _is_written(self, args[0]):
            return None  # As `conv.weight.data *= 2` ends.
        is_whole = self.whole is self
        if is_whole and func is tensor.requires_grad.__get__:
            return any(p.requires_grad for p in self.conv.branches.parameters())
        if is_whole and func in (tensor.requires_grad_, tensor.requires_grad.__set__):
            value = next(iter((*args, *kwargs.values())), True)
            self.conv.branches.requires_grad_(value)
            self.conv._forget()
            return self if func is tensor.requires_grad_ else None
        if name == '__set__':
            raise TypeError(NO_PARAMETER)
        # nn.Parameter() asks for a detached one of the same type, and marks it then.
        if name == 'detach' and sys._getframe(2).f_code is _NEW_PARAMETER:
            with torch._C.DisableTorchFunctionSubclass():
                return _Unmarked.of(self)
        return NotImplemented

    def __setattr__(self, name: str, value: Any) -> None:
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
        if not (whole.is_random and conv.has_own_start and conv.folds_online):
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
