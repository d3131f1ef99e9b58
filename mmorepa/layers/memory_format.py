"""Channels last: the order of memory in which convs and folds are fastest."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .plain import PlainKernel
from .reparam_conv import ReparamConv2d

# Where channels last was tried and is faster: networks, by the name of their class or
# of one that it inherits from, if they are made of modules of these packages and files.
_NETWORKS = {'StagedBackbone', 'ResNet', 'RepVGG'}
_PACKAGES = {'torch', 'torchvision', 'timm', 'mmengine', 'mmorepa'}
_FILES = {'resnet', 'resnext', 'res_layer', 'repvgg', 'drop'}


def set_channels_last(module: nn.Module, on: bool = True) -> nn.Module:
    """Makes the convs of a module run in ``torch.channels_last`` memory, or not.

    A fold gives a kernel with channels last, which costs no copy then; on CPUs, the
    whole network is faster as well. Numbers stay the same but for rounding. Call it
    before the optimizer is built: a fused update takes a parameter and its state for
    memory of one order.

    Other modules see nothing of it: what ``module`` returns is contiguous again, and so
    is what reaches the operators of MMCV inside of it (RoIAlign, deformable convs),
    which read memory in the default order without a look at the strides.

    Args:
        module (nn.Module): A backbone or a whole model, in place.
        on (bool): False goes back to the default order. Defaults to True.

    Returns:
        nn.Module: ``module`` itself.
    """
    memory_format = torch.channels_last if on else torch.contiguous_format
    operators = [part for part in module.modules() if _is_operator(part)]
    left = {inner for operator in operators for inner in operator.modules()}
    for part in module.modules():
        if part in left:
            continue
        if isinstance(part, ReparamConv2d):
            part.memory_format = memory_format
        if isinstance(part, (_ConvNd, PlainKernel)):
            weight = part._parameters.get('weight')
            if weight is not None and weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=memory_format)
    for operator in operators:
        _hook(operator, '_forward_pre_hooks', _with_contiguous_inputs, on)
    _hook(module, '_forward_hooks', _with_contiguous_outputs, on)
    return module


def faster_in_channels_last(model: nn.Module) -> list[nn.Module]:
    """The parts of a model for which channels last was measured to be faster.

    These are ResNets and RepVGGs of this package, of OpenMMLab, torchvision and timm,
    unless something is plugged into them: whole models, or the backbones of others.

    Args:
        model (nn.Module): Any model.

    Returns:
        list[nn.Module]: Parts that are not inside one another.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if _NETWORKS & names:
        is_tried = all(map(_is_tried, model.modules()))
        return [model] if is_tried else []
    parts = [faster_in_channels_last(child) for child in model.children()]
    return [part for found in parts for part in found]


def _is_tried(module: nn.Module) -> bool:
    package, *_, file = type(module).__module__.split('.')
    return package in _PACKAGES or file in _FILES


def _is_operator(module: nn.Module) -> bool:
    return type(module).__module__.startswith('mmcv.ops')


def _hook(module: nn.Module, kind: str, hook: Any, on: bool) -> None:
    hooks = getattr(module, kind)
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]
    if on:
        register = 'register_' + kind.strip('_').removesuffix('s')
        getattr(module, register)(hook)


def _with_contiguous_inputs(module: nn.Module, args: tuple) -> tuple:
    return _contiguous(args)


def _with_contiguous_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    return _contiguous(output)


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous()
    if type(value) in (tuple, list):
        return type(value)(map(_contiguous, value))
    return value
