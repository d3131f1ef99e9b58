"""PyTorch's fused update of all parameters in one loop, if it is available."""

from functools import partial

import torch
from mmengine.registry import OPTIMIZERS
from torch import nn
from torch.optim import SGD, Optimizer

from ...layers import OREPAKernel


def with_fused_update(optimizer_cfg: dict, model: nn.Module) -> dict:
    """The config of an optimizer, with ``fused=True`` if PyTorch accepts it.

    A config with ``fused`` or ``foreach`` is not changed.
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
        # The optimizer has no fused update for these options, this version or this
        # device, or no parameter is trained.
        return optimizer_cfg
    return {**optimizer_cfg, 'fused': True}


def start_momentum(optimizer: Optimizer) -> None:
    """Gives every parameter a momentum buffer if PyTorch's fused SGD needs it.

    Fused SGD fails if some parameters of a group have a buffer and others have none,
    for example because they had no gradient before. A buffer of zeros changes nothing:
    ``0.9 * 0 + g`` is ``g``.
    """
    for group in optimizer.param_groups:
        is_safe = group.get('momentum') and not group.get('dampening')
        if type(optimizer) is SGD and group.get('fused') and is_safe:
            for param in group['params']:
                optimizer.state[param]['momentum_buffer'] = torch.zeros_like(param)


def match_memory(model: nn.Module, optimizer: Optimizer) -> None:
    """Reorders loaded optimizer states to match the strides of their parameters.

    Fused updates assume that both have the same strides. In checkpoints of earlier
    versions, and of models without channels last, they may differ.
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
