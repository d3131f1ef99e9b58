"""Data parallelism that reduces folded kernels instead of their branches."""

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from ..layers import KernelLeaf, ReparamConv2d, held


@MODEL_WRAPPERS.register_module()
class FoldedDistributedDataParallel(MMDistributedDataParallel):
    """Averages the gradients of folded kernels, so that it sends as few bytes as DDP
    does for a plain network.

    It needs a ``Folded…OptimWrapper``, which passes the averages on to the branches.
    With any other wrapper of the optimizer, use ``MMDistributedDataParallel``.

    Args:
        module (nn.Module): The model.
        *args, **kwargs: See :class:`mmengine.model.MMDistributedDataParallel`. With
            ``find_unused_parameters=True``, convs may be frozen and unfrozen later.

    Examples:
        >>> model_wrapper_cfg = dict(type='FoldedDistributedDataParallel')
    """

    def __init__(self, module: nn.Module, *args, **kwargs) -> None:
        convs = [
            m
            for m in module.modules()
            if isinstance(m, ReparamConv2d) and m.folds_online and not m.deployed
        ]
        with torch.no_grad():
            parameters = [
                nn.Parameter(conv.folded_kernel(), conv.is_held_in_training)
                for conv in convs
            ]
        branches = {id(p) for conv in convs for p in conv.branches.parameters()}
        ignored = getattr(module, '_ddp_params_and_buffers_to_ignore', [])
        module._ddp_params_and_buffers_to_ignore = [
            *ignored,
            *(n for n, p in module.named_parameters() if id(p) in branches),
        ]
        # DDP registers the parameters that it finds at construction. So the kernels are
        # parameters of the module for that moment only.
        module.add_module('held_kernels', nn.ParameterList(parameters))
        try:
            super().__init__(module, *args, **kwargs)
        finally:
            del module.held_kernels
            # A later wrapper must not ignore the branches.
            module._ddp_params_and_buffers_to_ignore = ignored
        self._leaves = [KernelLeaf(parameter) for parameter in parameters]
        for conv, leaf in zip(convs, self._leaves):
            conv.training_scope = leaf
            # DDP broadcasts only what it reduces, which excludes the branches.
            for tensor in conv.branches.state_dict().values():
                source = dist.get_global_rank(self.process_group, 0)
                dist.broadcast(tensor, source, group=self.process_group)

    def forward(self, *args, **kwargs) -> object:
        """Runs the model, with held kernels if gradients are enabled."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        with held(self.module) as leaves:
            if not all(leaf.is_reduced for leaf in leaves):
                raise RuntimeError(
                    'the gradients of some convs would not be averaged: the wrapper is '
                    'a copy, or the convs came after it. Wrap the model itself again '
                    '(its .module)'
                )
            for leaf in leaves:
                leaf.awaits_sync = not self.require_backward_grad_sync
            return super().forward(*args, **kwargs)

    def __getstate__(self) -> dict:
        # The leaves belong to the convs of the original, see forward().
        return {**super().__getstate__(), '_leaves': []}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the held kernels as well."""
        super().zero_grad(set_to_none)
        for leaf in self._leaves:
            leaf.parameter.grad = None
