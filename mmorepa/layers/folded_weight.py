"""What readers of a training form's ``weight`` get."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

NO_PARAMETER = (
    'the weight of a training form is folded from its branches and cannot be set; '
    'change conv.branches, or deploy the model first, by '
    'mmorepa.switch_to_deploy(model) or deploy=True in conv_cfg'
)


class FoldedWeight(Tensor):
    """A fold: a tensor to compute with, and not to write to.

    It belongs to no conv any more, so that a value written to it would be lost without
    a word. To assign one raises; the rules of ``init_weights``, which networks apply
    to every conv that they know, warn and are passed over. What is computed from it is
    an ordinary tensor, :meth:`~torch.Tensor.detach` included.
    """

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
        # Functions of torch.nn.init hand their arguments on by name.
        first = args[0] if args else kwargs.get('tensor')
        if isinstance(first, cls):
            if name in ('__set__', '__setitem__', 'copy_', 'set_'):
                raise TypeError(NO_PARAMETER)
            if name.endswith('_') and not name.endswith('__'):
                warnings.warn(f'{name} has no effect: {NO_PARAMETER}', stacklevel=3)
                return first
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        # ``weight.data`` is written to as often as ``weight``.
        return found.as_subclass(cls) if func == Tensor.data.__get__ else found
