"""PyTorch's fused update of all parameters in one loop, where it can be had."""

from functools import partial

import torch
from mmengine.registry import OPTIMIZERS
from torch import nn
from torch.optim import SGD, Optimizer

from ...layers import OREPAKernel


def with_fused_update(optimizer_cfg: dict, model: nn.Module) -> dict:
    """The config of an optimizer, with ``fused=True`` where PyTorch takes that.

    One that says ``fused`` or ``foreach`` stays as it is.
    """
    options = dict(optimizer_cfg)
    kind = options.pop('type')
    if isinstance(kind, str):
        kind = OPTIMIZERS.get(kind)
    is_pytorch = kind is not None and kind.__module__.startswith('torch.optim.')
    if not is_pytorch or {'fused', 'foreach'} & options.keys():
        return optimizer_cfg
    trained = [param for param in model.parameters() if param.requires_grad]
    try:
        kind(trained, **options, fused=True)
    except (TypeError, ValueError, RuntimeError):
        # It has no such update, or not with other options, in this version or on this
        # device; or nothing is trained.
        return optimizer_cfg
    return {**optimizer_cfg, 'fused': True}


def start_momentum(optimizer: Optimizer) -> None:
    """Gives every parameter a momentum buffer where PyTorch's fused SGD needs it.

    It fails unless all parameters of a group have a buffer, or none has, as where one
    had no gradient before. A buffer of zeros is the same start: ``0.9 * 0 + g`` is
    ``g``.
    """
    for group in optimizer.param_groups:
        is_safe = group.get('momentum') and not group.get('dampening')
        if type(optimizer) is SGD and group.get('fused') and is_safe:
            for param in group['params']:
                optimizer.state[param]['momentum_buffer'] = torch.zeros_like(param)


def match_memory(model: nn.Module, optimizer: Optimizer) -> None:
    """Gives states that were loaded the memory order of their parameters.

    A fused update takes both for memory of one order, and checkpoints bring another
    one: that of an earlier version, or of a model without channels last.
    """
    reorder = {
        kernel.get_parameter(name): partial(kernel.branch_sum.from_former, name)
        for kernel in model.modules()
        if isinstance(kernel, OREPAKernel)
        for name in kernel.branch_sum.roles.keys() & kernel._parameters.keys()
    }
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            if param in reorder:
                value = reorder[param](value)
            if value.shape == param.shape and value.stride() != param.stride():
                value = torch.empty_like(param, dtype=value.dtype).copy_(value)
            state[name] = value
