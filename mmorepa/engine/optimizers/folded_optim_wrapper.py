"""Folded training: the fold outside of the graph, once per optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...layers import ReparamConv2d
from .bfloat16_optim_wrapper import BFloat16OptimWrapper


class _FoldedTraining:
    """What folded training adds to an optimizer wrapper.

    The fold does not depend on the data. So forward and backward passes run on the
    folded kernels as ordinary leaf parameters of an ordinary plain network, and at
    the optimizer step their gradients are passed on to the branches:
    ``dL/dθ = Jᵀ · dL/dW``. This is linear in the gradient, with the same ``J`` on every
    process and for every micro-batch, so that the result is that of online folding
    under gradient accumulation, loss scaling, clipping and data parallelism too.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[ReparamConv2d, nn.Parameter] = {}
        self._wrapper: Optional[nn.Module] = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Holds the kernels for the forward and backward pass.

        Args:
            model (nn.Module): The model, wrapped or not.
        """
        network = model.module if is_model_wrapper(model) else model
        # Other wrappers keep parameters in pieces, which only a forward pass puts
        # together: these fold online.
        can_hold = network is model or isinstance(model, DistributedDataParallel)
        convs = (m for m in network.modules() if isinstance(m, ReparamConv2d))
        kernels = {conv: conv.hold_kernel() for conv in convs} if can_hold else {}
        self._held = {c: kernel for c, kernel in kernels.items() if kernel is not None}
        if isinstance(model, DistributedDataParallel) and model is not self._wrapper:
            _reduce_held_kernels(model, self._held)
            self._wrapper = model
        with super().optim_context(model):
            yield

    def step(self, **kwargs) -> None:
        """Passes the gradients on to the branches, then steps."""
        for conv in self._held:
            conv.pull_back()
        super().step(**kwargs)
        # Not before: checkpointed blocks run their forward pass in the backward one.
        for conv in self._held:
            conv.release_kernel()

    def zero_grad(self, **kwargs) -> None:
        """Clears the gradients of the held kernels as well."""
        super().zero_grad(**kwargs)
        for kernel in self._held.values():
            kernel.grad = None


@OPTIM_WRAPPERS.register_module()
class FoldedOptimWrapper(_FoldedTraining, OptimWrapper):
    """Folded training in full precision.

    Chosen by one line in a config; checkpoints are those of online folding, either
    of which resumes from the other's.

    Args:
        *args, **kwargs: See :class:`mmengine.optim.OptimWrapper`.

    Examples:
        >>> optim_wrapper = dict(type='FoldedOptimWrapper', optimizer=dict(type='SGD'))
    """


@OPTIM_WRAPPERS.register_module()
class FoldedAmpOptimWrapper(_FoldedTraining, AmpOptimWrapper):
    """Folded training in mixed precision with loss scaling.

    Args:
        *args, **kwargs: See :class:`mmengine.optim.AmpOptimWrapper`.
    """


@OPTIM_WRAPPERS.register_module()
class FoldedBFloat16OptimWrapper(_FoldedTraining, BFloat16OptimWrapper):
    """Folded training in bfloat16, on the CPU too.

    Args:
        *args, **kwargs: See :class:`mmengine.optim.OptimWrapper`.
    """


def _reduce_held_kernels(
    wrapper: DistributedDataParallel, held: dict[ReparamConv2d, nn.Parameter]
) -> None:
    """Makes data parallelism average the kernels' gradients, not the branches'.

    Which parameters are reduced is decided when the wrapper is made, which MMEngine
    does before there is an optimizer; so it is made anew, in place.
    """
    network = wrapper.module
    branches = {id(p) for conv in held for p in conv.branches.parameters()}
    network._ddp_params_and_buffers_to_ignore = [
        name for name, param in network.named_parameters() if id(param) in branches
    ]
    hooks = list(wrapper._comm_hooks)
    for conv, kernel in held.items():
        conv.register_parameter('held_kernel', kernel)
    try:
        DistributedDataParallel.__init__(
            wrapper,
            network,
            device_ids=wrapper.device_ids,
            output_device=wrapper.output_device,
            dim=wrapper.dim,
            broadcast_buffers=wrapper.broadcast_buffers,
            process_group=wrapper.process_group,
            bucket_cap_mb=wrapper.bucket_bytes_cap / 1024**2,
            find_unused_parameters=wrapper.find_unused_parameters,
            gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
            static_graph=wrapper.static_graph,
        )
    finally:
        # For everybody else, the branches are the parameters.
        for conv in held:
            del conv.held_kernel
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
