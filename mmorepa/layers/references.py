"""Where a model holds its modules: by their names, and in plain containers beside."""

import gc
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, Optional

import torch
from torch import Tensor, nn

_PARALLEL = {'DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule'}
_REGISTERED = ('_modules', '_parameters', '_buffers')
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def replace_modules(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module]
) -> None:
    """Puts modules in the places of others, in a whole model.

    That is under all of their names, and where a module of the model has them as plain
    attributes, in lists, tuples, dicts, sets or deques.
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = replacements.get(child, child)
        attributes = vars(module)
        for name in attributes.keys() - _REGISTERED:
            attributes[name] = _replaced(attributes[name], replacements)


def _replaced(value: Any, replacements: Mapping[nn.Module, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if not isinstance(value, _CONTAINERS) or not any(
        module in replacements for module, _ in references(value)
    ):
        return value
    if isinstance(value, dict):
        items = [
            (_replaced(key, replacements), _replaced(item, replacements))
            for key, item in dict.items(value)
        ]
    else:
        items = [_replaced(item, replacements) for item in value]
    if isinstance(value, (tuple, frozenset)):
        return getattr(value, '_make', type(value))(items)  # Of a named tuple.
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(items)
    else:
        value.update(items)
    return value


def references(value: Any, depth: int = 7) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that an attribute refers to, up to some objects deep.

    Each comes with whether it is hidden where :func:`replace_modules` cannot reach it:
    behind a method, a function or an object.
    """
    level, seen = [(value, False)], set()
    for _ in range(depth + 1):
        deeper = []
        for item, is_hidden in level:
            key = id(item), is_hidden
            if key in seen or isinstance(item, (type, ModuleType, Tensor, str)):
                continue
            seen.add(key)
            if isinstance(item, nn.Module):
                yield item, is_hidden
                continue
            inner = gc.get_referents(item)
            if isinstance(item, FunctionType):  # And not all that its module has.
                inner = [item.__closure__, item.__defaults__]
            is_hidden = is_hidden or not isinstance(item, _CONTAINERS)
            deeper += [(part, is_hidden) for part in inner]
        level = deeper


def hidden_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that cannot be replaced, with the name of what holds them."""
    hidden = {}
    for owner, module in model.named_modules():
        for name in vars(module).keys() - _REGISTERED:
            for other, is_hidden in references(vars(module)[name]):
                if is_hidden and other is not module:
                    hidden[other] = f'{owner}.{name}'.lstrip('.')
    return hidden


def parallel_wrapper(model: nn.Module) -> Optional[nn.Module]:
    """What averages gradients, or shards parameters, in or around a model."""
    for module in model.modules():
        if _is_parallel(type(module)):
            return module
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    gc.collect()  # A wrapper that was dropped is in a cycle of references.
    for item in gc.get_objects():
        kind = type(item)  # Some objects say that they are of another class.
        is_wrapper = issubclass(kind, nn.Module) and _is_parallel(kind)
        if is_wrapper and any(module is model for module in item.modules()):
            return item
    return None


def _is_parallel(kind: type) -> bool:
    return any(cls.__name__ in _PARALLEL for cls in kind.__mro__)
