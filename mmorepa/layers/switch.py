"""Switches whole models from training form to deployed form."""

import copy
import gc
from collections.abc import Iterator
from typing import Optional, Union

import torch
from torch import Tensor, nn

from .changes import check_foldable
from .conv import ReparamConv2d
from .folding import check_not_sharded

# The attributes that any conv has.
OF_CONVS = vars(nn.Conv2d(1, 1, 1, device='meta')).keys()
_PARTS = {'weight', 'bias', 'norm', 'act'}
_PARALLEL = {'DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule'}


def switch_to_deploy(module: nn.Module) -> nn.Module:
    """Switches every re-parameterised conv inside ``module`` to its plain form.

    Each conv becomes a :class:`torch.nn.Conv2d`, or a :class:`ConvAct2d` if it has an
    activation. It stays the same object and keeps the attributes that were set on it. A
    conv keeps its class if its norm cannot be folded (GroupNorm and the like), if a
    user has overridden its methods, if it has an activation and also hooks, parameters
    or modules of its own, or if it is ``module`` itself. The keys of the state dict are
    the same as in a model that is built with ``deploy=True``.

    Args:
        module (nn.Module): A layer, a backbone, or a whole model, changed in place and
            returned.

    Raises:
        RuntimeError: If a wrapper for data parallelism contains ``module`` and is in
            training mode. After deployment, a wrapper can run in eval mode only.
    """
    convs = dict.fromkeys(conv for _, conv in outermost(module))
    forms = [conv for conv in convs if not conv.deployed]
    wrapper = parallel_wrapper(module) if forms else None
    if wrapper is not None:
        for conv in forms:
            check_not_sharded(list(conv.parameters()))
        _refuse_training(wrapper)
        wrapper.register_forward_pre_hook(_refuse_training)
    for conv in forms:  # Check all convs before the first one is changed.
        check_foldable(conv)
    for conv in convs:
        conv.switch_to_deploy()
        if conv is not module:
            _become_plain(conv)
    return module


def _become_plain(conv: ReparamConv2d) -> None:
    """Makes a deployed conv a plain conv; it stays the same object."""
    act = conv.act
    has_more = act is not None and (
        has_hooks(conv)
        or next(act.parameters(), None) is not None
        or {*conv._parameters, *conv._buffers, *conv._modules} - _PARTS
    )
    if has_more or conv.norm is not None or _overrides(conv):
        return
    for name in {*conv._built, 'norm', 'act'} - OF_CONVS:
        vars(conv).pop(name, None)
        conv._modules.pop(name, None)
    conv.__class__ = nn.Conv2d
    if act is not None:
        inner = copy.copy(conv)
        added = {name: vars(conv)[name] for name in vars(conv).keys() - OF_CONVS}
        vars(conv).clear()
        conv.__class__ = ConvAct2d
        ConvAct2d.__init__(conv, inner, act)
        vars(conv).update(added)
        conv.train(inner.training)


def _overrides(conv: ReparamConv2d) -> bool:
    """Whether overridden methods of a conv may compute something else."""
    return any(map(callable, vars(conv).values())) or any(
        getattr(type(conv), name) is not getattr(ReparamConv2d, name)
        for name in ('forward', '_conv_forward', '__call__')
    )


def parallel_wrapper(model: nn.Module) -> Optional[nn.Module]:
    """A wrapper that averages gradients or shards parameters, in or around a model."""
    for module in model.modules():
        if _is_parallel(type(module)):
            return module
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    gc.collect()  # Deletes dropped wrappers, which are cycles of references.
    for item in gc.get_objects():
        kind = type(item)  # isinstance() may believe a wrong __class__.
        is_wrapper = issubclass(kind, nn.Module) and _is_parallel(kind)
        if is_wrapper and any(module is model for module in item.modules()):
            return item
    return None


def _is_parallel(kind: type) -> bool:
    return any(cls.__name__ in _PARALLEL for cls in kind.__mro__)


def _refuse_training(wrapper: nn.Module, *args) -> None:
    if wrapper.training and torch.is_grad_enabled():
        raise RuntimeError(
            f'{type(wrapper).__name__} averages the gradients of branches, and would '
            'not those of a model that is deployed inside of it: deploy the model '
            'first, and wrap it again'
        )


def has_hooks(owner: Union[nn.Module, Tensor]) -> bool:
    """Whether a module or a parameter has hooks."""
    names = (*vars(owner), '_backward_hooks', '_post_accumulate_grad_hooks')
    return any(getattr(owner, n, None) for n in names if n.endswith('_hooks'))


class ConvAct2d(nn.Sequential):
    """A plain conv and its activation, with the state dict of the conv alone."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = act
        self._register_state_dict_hook(_without_conv)

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Optional[Tensor]:
        return self.conv.bias

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args
    ) -> None:
        for name in ('weight', 'bias'):
            if f'{prefix}{name}' in state_dict:
                state_dict[f'{prefix}conv.{name}'] = state_dict.pop(f'{prefix}{name}')
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_conv(
    module: ConvAct2d, state_dict: dict[str, Tensor], prefix: str, metadata: dict
) -> None:
    for name in ('weight', 'bias'):
        if f'{prefix}conv.{name}' in state_dict:
            state_dict[f'{prefix}{name}'] = state_dict.pop(f'{prefix}conv.{name}')


def is_switchable(module: nn.Module) -> bool:
    """Whether :func:`switch_to_deploy` would fold something in a module."""
    return any(not conv.deployed for _, conv in outermost(module))


def outermost(
    module: nn.Module, kind: type[nn.Module] = ReparamConv2d, name: str = ''
) -> Iterator[tuple[str, nn.Module]]:
    """Yields names and modules of a type that are not inside of another such module.

    So a branch that is itself a re-parameterised conv is not listed beside its block.

    Args:
        module (nn.Module): Any module.
        kind (type[nn.Module]): Defaults to :class:`ReparamConv2d`.
        name (str): The name of ``module``. Defaults to ``''``, the whole model.
    """
    if isinstance(module, kind):
        yield name, module
        return
    for child_name, child in module.named_children():
        full_name = f'{name}.{child_name}' if name else child_name
        yield from outermost(child, kind, full_name)
