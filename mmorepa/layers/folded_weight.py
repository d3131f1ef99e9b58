"""The ``weight`` of a training form: a kernel that can be read and written."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..functional import is_being_traced

NO_PARAMETER = (
    'the weight of a training form is folded from its branches, anew each time: it is '
    'no parameter, and keeps no gradient, hooks or attributes. Those are of the '
    'parameters of conv.branches. To start the branches from a kernel, call '
    'conv.start_from(kernel) or write to conv.weight.data in place; to have a '
    'parameter (for spectral norm, for example), deploy the model first, by '
    'mmorepa.switch_to_deploy(model) or deploy=True in conv_cfg'
)
_DRAWS = ('normal_', 'uniform_', 'kaiming_uniform_')
_SETS = ('zero_', 'fill_', '__setitem__')
_HOOKS = ('register_hook', 'register_post_accumulate_grad_hook')


class WeightOfBranches(nn.Conv2d):
    """A conv whose ``weight`` is the fold of its branches until it is deployed."""

    deployed = True  # While the constructor of nn.Conv2d runs.

    def _weight_of_training_form(self) -> Tensor:
        kernel = self.kernel()
        return kernel if is_being_traced() else FoldedWeight.of(self, kernel)

    def __getattr__(self, name: str) -> Any:
        if name == 'weight' and not self.deployed:
            return self._weight_of_training_form()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'weight' and not self.deployed:
            raise TypeError(NO_PARAMETER)
        if name == 'qconfig' and value is not None and not self.deployed:
            raise TypeError(
                'a training form is not quantized: call '
                'mmorepa.switch_to_deploy(model) first, and train that with prepare_qat'
            )
        super().__setattr__(name, value)


class ParametersOfBranches(dict):
    """The ``_parameters`` of a training form; ``['weight']`` raises a clear error."""

    def __missing__(self, name: str) -> None:
        raise KeyError(NO_PARAMETER if name == 'weight' else name)


class FoldedWeight(Tensor):
    """A folded kernel, as a tensor to compute with.

    Writing to it in place (``normal_``, ``copy_``, ``weight[0] = …``, also through
    ``.data`` and views) starts the branches from the written kernel, see
    :meth:`~mmorepa.layers.ReparamConv2d.set_kernel`. Random numbers are an exception,
    since networks draw the weights of all their convs: the branches are drawn anew. If
    a norm follows the conv, the written numbers are then ignored. If the branches
    cannot give the kernel, they take only the norm of each output channel.

    Results of computations and copies are ordinary tensors. ``requires_grad`` is that
    of the branches. Asking for hooks or gradients raises a TypeError.
    """

    conv: Any = None  # The ReparamConv2d that owns the branches.
    whole: Any = None  # The whole kernel: this tensor, or the base of this view.
    is_random = False  # Whether random numbers have been written to the whole.

    @classmethod
    def of(cls, conv: nn.Conv2d, kernel: Tensor) -> 'FoldedWeight':
        """Copies the kernel of a conv."""
        # Tensors that are made in inference mode do not count writes.
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
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            answer = args[0]._as_parameter(func, args[1:], kwargs)
            if answer is not NotImplemented:
                return answer
        name = getattr(func, '__name__', '')
        is_rule = getattr(func, '__module__', '') == 'torch.nn.init'
        weights = [t for t in tree_leaves((args, kwargs)) if isinstance(t, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [weight._version for weight in weights]
            result = func(*args, **kwargs)
            for weight, version in zip(weights, versions):
                if weight._version == version:
                    continue
                # PyTorch refuses the same for a parameter that requires a gradient.
                if torch.is_grad_enabled() and weight.requires_grad and not is_rule:
                    raise TypeError(NO_PARAMETER)
                weight.whole._start_branches(name)
            if name == 'detach':  # Other modules make parameters of the result.
                return result
            return tree_map(lambda item: _as_view(item, weights), result)

    def _as_parameter(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Answers calls for which a temporary tensor would differ from a parameter."""
        tensor, name = torch.Tensor, getattr(func, '__name__', '')
        if func == tensor.requires_grad.__get__ and self.whole is self:
            return any(p.requires_grad for p in self.conv.branches.parameters())
        if func in (tensor.requires_grad_, tensor.requires_grad.__set__):
            value = next(iter((*args, *kwargs.values())), True)
            self.conv.branches.requires_grad_(value)
            self.conv.forget_folds()
            return self if name == 'requires_grad_' else None
        if func == tensor.data.__set__:
            is_view = isinstance(args[0], FoldedWeight) and args[0].whole is self.whole
            if is_view and args[0].shape == self.shape:
                return None  # The last step of `conv.weight.data *= 2`.
        if func == tensor.grad.__get__ or name in ('__set__', 'set_', *_HOOKS):
            raise TypeError(NO_PARAMETER)
        return NotImplemented

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(FoldedWeight, name):  # The next fold would lose it.
            raise TypeError(NO_PARAMETER)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def _start_branches(self, function: str) -> None:
        """Starts the branches from this kernel after a function has written to it."""
        # trunc_normal_ draws numbers and then calls other functions on them.
        was_random = self.is_random
        self.is_random = function in _DRAWS or (was_random and function not in _SETS)
        if self.is_random and not was_random:
            self.conv.refresh()
        if not (self.is_random and self.conv.keeps_own_init and self.conv.folds_online):
            kernel = self.detach().as_subclass(Tensor)
            self.conv.set_kernel(kernel, exactly=not self.is_random)


def _as_view(result: Any, weights: Sequence[FoldedWeight]) -> Any:
    """Makes a result of a function a FoldedWeight if it is a view of one."""
    if type(result) is Tensor:
        memory = result.untyped_storage()._cdata
        for weight in weights:
            if weight.untyped_storage()._cdata == memory:
                view = result.as_subclass(FoldedWeight)
                view.conv, view.whole = weight.conv, weight.whole
                return view
    return result
