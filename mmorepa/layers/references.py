"""Where a model holds its modules: by their names, and in plain containers beside."""

import gc
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, Optional

import torch
from torch import nn

_PARALLEL = {'DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule'}
_REGISTERED = ('_modules', '_parameters', '_buffers')


def replace_modules(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module]
) -> None:
    """Puts modules in the places of others, in a whole model.

    That is under all of their names, and where a module of the model has them as plain
    attributes, in lists, tuples, dicts, sets or deques.

    Args:
        model (nn.Module): Changed in place.
        replacements (Mapping[nn.Module, nn.Module]): What takes the place of what.
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
    if not any(m in replacements for m, _ in references(value)):
        return value
    if isinstance(value, dict):
        items = [(_replaced(k, replacements), v) for k, v in dict.items(value)]
        value.clear()
        value.update((k, _replaced(v, replacements)) for k, v in items)
        return value
    if not isinstance(value, (list, deque, set, frozenset, tuple)):
        return value
    items = [_replaced(item, replacements) for item in value]
    if isinstance(value, tuple):
        return value._make(items) if hasattr(value, '_make') else type(value)(items)
    if isinstance(value, frozenset):
        return frozenset(items)
    value.clear()
    value.update(items) if isinstance(value, set) else value.extend(items)
    return value


def references(
    value: Any, is_hidden: bool = False, depth: int = 5
) -> Iterator[tuple[nn.Module, bool]]:
    """The modules that an attribute of another one refers to.

    Args:
        value (Any): The attribute.
        is_hidden (bool): Whether it is hidden already. Defaults to False.
        depth (int): How many objects deep to look. Defaults to 5.

    Yields:
        tuple[nn.Module, bool]: A module, and whether it is hidden where
        :func:`replace_modules` cannot reach: behind a method, a function or an object.
    """
    inner: list = []
    if isinstance(value, nn.Module):
        yield value, is_hidden
    elif isinstance(value, dict):
        inner = [*dict.keys(value), *dict.values(value)]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = list(value)
    else:
        is_hidden = True
        if isinstance(value, MethodType):
            inner = [value.__self__]
        elif isinstance(value, partial):
            inner = [value.func, value.args, value.keywords]
        elif isinstance(value, FunctionType):
            inner = [_content(cell) for cell in value.__closure__ or ()]
            inner += value.__defaults__ or ()
        elif not isinstance(value, (type, ModuleType, torch.Tensor)):
            inner = list(getattr(value, '__dict__', {}).values())
    if depth:
        for item in inner:
            yield from references(item, is_hidden, depth - 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Nothing has been stored there.
        return None


def hidden_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that something in a model holds where they cannot be replaced.

    Args:
        model (nn.Module): Any model.

    Returns:
        dict[nn.Module, str]: By module, the name of an attribute that holds it.
    """
    hidden = {}
    for owner, module in model.named_modules():
        for name in vars(module).keys() - _REGISTERED:
            for other, is_hidden in references(vars(module)[name]):
                if is_hidden and other is not module:
                    hidden[other] = f'{owner}.{name}'.lstrip('.')
    return hidden


def parallel_wrapper(model: nn.Module) -> Optional[nn.Module]:
    """What averages gradients, or shards parameters, in or around a model.

    Args:
        model (nn.Module): The wrapper, or what is inside of it.
    """
    for module in model.modules():
        if _is_parallel(type(module)):
            return module
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    gc.collect()  # A wrapper that was dropped is in a cycle of references.
    kinds: dict[type, bool] = {}
    for item in gc.get_objects():
        kind = type(item)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, nn.Module) and _is_parallel(kind)
        if kinds[kind] and any(module is model for module in item.modules()):
            return item
    return None


def _is_parallel(kind: type) -> bool:
    return any(cls.__name__ in _PARALLEL for cls in kind.__mro__)
