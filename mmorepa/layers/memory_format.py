"""Channels last: the memory format in which convs and folds are fastest."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from .conv import ReparamConv2d
from .folding import in_memory_format
from .plain import PlainKernel

# Networks for which channels last was measured to be faster. A network counts if its
# class or a base class has one of these names, and all its modules come from these
# packages, or from these files of OpenMMLab.
_NETWORKS = {'StagedBackbone', 'ResNet', 'RepVGG'}
_PACKAGES = {'torch', 'torchvision', 'timm', 'mmengine', 'mmorepa'}
_OPENMMLAB = {'mmcv', 'mmpretrain', 'mmdet', 'mmseg'}
_FILES = {'resnet', 'resnext', 'res_layer', 'repvgg', 'conv_module', 'drop'}


def set_channels_last(module: nn.Module, on: bool = True) -> nn.Module:
    """Makes the convs of a module run in ``torch.channels_last`` memory, or not.

    A fold computes its kernel in channels last, so this saves a copy. On CPUs, the
    whole network is faster too. Call it before building the optimizer, because a fused
    update needs a parameter and its state with the same strides. Call it before
    wrapping the model for data parallelism, because the wrapper keeps the strides.

    Outputs of ``module``, also in tuples, lists and dicts, are made contiguous. Inputs
    are made contiguous for modules of ``mmcv.ops``, which ignore strides, and for
    strided 1×1 convs with fewer than 8 inputs, because of a bug in oneDNN. If you call
    a function of ``mmcv.ops``, give it contiguous maps.

    Args:
        module (nn.Module): A backbone or a whole model, changed in place and returned.
        on (bool): False restores the default format. Defaults to True.

    Raises:
        RuntimeError: If ``module`` is wrapped for data parallelism.
    """
    if any(isinstance(part, DistributedDataParallel) for part in module.modules()):
        raise RuntimeError(
            'the model is wrapped for data parallelism, which would average gradients '
            'in the former order of memory: call set_channels_last before the wrapper'
        )
    memory_format = torch.channels_last if on else torch.contiguous_format
    operators = [part for part in module.modules() if _needs_contiguous_inputs(part)]
    excluded = {inner for operator in operators for inner in operator.modules()}
    for part in module.modules():
        if part in excluded:
            continue
        if isinstance(part, ReparamConv2d):
            part.channels_last = on
        if isinstance(part, (_ConvNd, PlainKernel)):
            weight = part._parameters.get('weight')
            if weight is not None and weight.dim() == 4:
                weight.data = in_memory_format(weight.data, memory_format)
                if weight.grad is not None:
                    weight.grad = in_memory_format(weight.grad, memory_format)
    for part in operators:
        _unhook(part._forward_pre_hooks, _with_contiguous_inputs)
        if on:
            part.register_forward_pre_hook(_with_contiguous_inputs, with_kwargs=True)
    _unhook(module._forward_hooks, _with_contiguous_outputs)
    if on:
        module.register_forward_hook(_with_contiguous_outputs)
    return module


def faster_in_channels_last(model: nn.Module) -> list[nn.Module]:
    """The parts of a model for which channels last was measured to be faster.

    These are ResNets and RepVGGs of this package, OpenMMLab, torchvision and timm
    without added modules, as whole models or as backbones of other models.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if _NETWORKS & names:
        is_tried = all(map(_is_tried, model.modules()))
        return [model] if is_tried else []
    return [part for m in model.children() for part in faster_in_channels_last(m)]


def _is_tried(module: nn.Module) -> bool:
    names = type(module).__module__.split('.')
    is_known = names[0] in _OPENMMLAB and names[-1] in _FILES
    return is_known or names[0] in _PACKAGES


def _needs_contiguous_inputs(module: nn.Module) -> bool:
    """Whether a module computes wrong results from channels last."""
    if isinstance(module, nn.Conv2d) and module.in_channels < 8:
        # On CPUs without AVX-512, the derivative in oneDNN writes out of bounds.
        return max(module.kernel_size) == 1 and max(module.stride) > 1
    return any(cls.__module__.startswith('mmcv.ops') for cls in type(module).__mro__)


def _unhook(hooks: dict, hook: Any) -> None:
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]


def _with_contiguous_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    return _contiguous(args), _contiguous(kwargs)


def _with_contiguous_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    return _contiguous(output)


def _contiguous(value: Any) -> Any:
    """Makes maps contiguous, also in tuples, lists and dicts."""
    return tree_map_only(Tensor, lambda t: t.contiguous() if t.dim() == 4 else t, value)
