"""Scopes: ``with`` blocks that fold a model's kernels once and reuse them.

Outside of a scope, every forward pass folds, so no kernel can be out of date. Inside,
a conv asks its ``training_scope`` first, a :class:`KernelLeaf`, and then its
``evaluation_scope``, an :class:`EvaluationScope`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..functional import is_being_traced
from .capture import RecordedFolds
from .changes import forward_hooks, overridden_fold
from .conv import ReparamConv2d
from .folding import fuse_norm, named_tensors, same_objects, to_float64

FusedConv = tuple[Tensor, Optional[Tensor], Optional[nn.Module]]


@contextmanager
def folded(model: nn.Module, in_traces: bool = False) -> Iterator[nn.Module]:
    """Folds each conv of a model once and reuses its kernel until the block ends.

    This speeds up evaluation: a conv in eval mode, without gradients, runs as the plain
    conv that it equals, BatchNorm included. In training mode, the block reuses the
    kernel alone. A conv folds when it first runs, with a gradient if gradients are
    enabled. After that, the block ignores writes to its parameters and BatchNorms.
    :meth:`~torch.nn.Module.train`, :meth:`~torch.nn.Module.eval`, loading a state dict
    or moving the model makes the conv fold again. A block allows one backward pass.
    A nested block has no effect: the outermost one keeps the kernels.

    Args:
        model (nn.Module): A layer or a whole model, wrapped or not.
        in_traces (bool): Whether a traced graph contains the finished kernels instead
            of the fold. Defaults to False.

    Examples:
        >>> with mmorepa.folded(model), torch.no_grad():
        ...     for batch in batches:
        ...         model(batch)
    """
    convs = [c for c in _training_forms(model) if c.evaluation_scope is None]
    for conv in convs:
        conv.evaluation_scope = EvaluationScope(in_traces)
    try:
        yield model
    finally:
        for conv in convs:
            if isinstance(conv, ReparamConv2d):  # Deployment changes the class.
                conv.evaluation_scope = None


class Sources:
    """The tensors and modules of a conv, to notice when a call replaces one of them."""

    def __init__(self, conv: ReparamConv2d) -> None:
        modules = list(conv.modules())
        names = ('_parameters', '_buffers', '_modules')
        places = [vars(module)[name] for module in modules for name in names]
        self._places = [(place, [*place.values()]) for place in places if place]

    def are_current(self) -> bool:
        """Whether the conv still has the same objects."""
        return all(
            same_objects([*place.values()], sources) for place, sources in self._places
        )


class EvaluationScope:
    """The folds of one conv; each is made at the first request."""

    def __init__(self, in_traces: bool = False) -> None:
        self._in_traces = in_traces
        self._folds: Optional[tuple[Sources, dict[str, Any]]] = None

    def kernel(self, conv: ReparamConv2d) -> Tensor:
        """The kernel of the conv, with a gradient if gradients are enabled."""
        if is_being_traced() and not self._in_traces:
            return conv.folded_kernel()
        with_grad = torch.is_grad_enabled()
        name = 'trained kernel' if with_grad else 'kernel'
        return self._once(conv, name, conv.folded_kernel, with_grad)

    def fused_conv(self, conv: ReparamConv2d) -> Optional[FusedConv]:
        """Kernel, bias and norm in eval mode; a fused norm is None.

        Returns None if the conv must run its training form.
        """
        if conv.training or torch.is_grad_enabled() or is_being_traced():
            return None
        return self._once(conv, 'fused', lambda: _fused_conv(conv), with_grad=False)

    def forget(self, conv: ReparamConv2d) -> None:
        """Drops the folds of the conv, which has changed."""
        self._folds = None

    def _once(
        self, conv: ReparamConv2d, name: str, make: Callable[[], Any], with_grad: bool
    ) -> Any:
        if '_is_replica' in vars(conv):  # DataParallel uses it for one forward pass.
            return make()
        folds = self._folds
        if folds is None or not (is_being_traced() or folds[0].are_current()):
            folds = self._folds = Sources(conv), {}
        by_name = folds[1]
        if name not in by_name:
            # Autograd could not use tensors that are made in inference mode.
            with torch.inference_mode(False), torch.set_grad_enabled(with_grad):
                by_name[name] = make()
        return by_name[name]


def _fused_conv(conv: ReparamConv2d) -> Optional[FusedConv]:
    # A BatchNorm may be in training mode though the conv is not, or may have hooks.
    # In both cases it must run.
    inner = list(conv.modules())[1:]
    if conv.deployed or overridden_fold(conv) or any(map(_must_run, inner)):
        return None
    bias = None if conv.bias is None else to_float64(conv.bias)
    if conv.folds_online:
        # This fold is fast and has the precision of the training form.
        like = conv.folded_kernel()
        kernel = to_float64(like)
    else:
        kernel, bias = conv.branches_kernel_bias(bias)
        # Some branches have no kernel: they average, or they consist of a norm.
        like = next(t for t in named_tensors(conv.branches).values() if t.dim() == 4)
    norm = conv.norm
    if conv.fuses_norm:
        kernel, bias = fuse_norm(kernel, bias, norm)
        norm = None
    return kernel.to(like), None if bias is None else bias.to(like), norm


def _must_run(module: nn.Module) -> bool:
    return module.training or bool(forward_hooks(module))


@contextmanager
def held(
    model: nn.Module, recorded: Optional[RecordedFolds] = None
) -> Iterator[list['KernelLeaf']]:
    """Folds the trained kernels of a model once, as leaves of the autograd graph.

    Inside of the block, passes with gradients use each kernel as a leaf, like a plain
    weight. The outermost block folds when it begins. The gradient of a leaf reaches
    the branches in the same backward pass or, if :attr:`KernelGraph.is_deferred` is
    True, when :func:`backward_to_branches` is called.

    Args:
        model (nn.Module): With or without a wrapper for data parallelism.
        recorded (RecordedFolds, optional): Replays the fold of all kernels. The leaves
            have the dtype of autocast if autocast is on. Defaults to None.

    Yields:
        list[KernelLeaf]: One for each trained kernel.

    Raises:
        RuntimeError: If data parallelism does not average the gradient of a kernel.
    """
    leaves = _hold(model, recorded)
    try:
        yield leaves
    finally:
        for leaf in leaves:
            leaf.depth -= 1


# Graph break: torch.compile resumes after this and sees leaves.
@torch.compiler.disable
def _hold(model: nn.Module, recorded: Optional[RecordedFolds]) -> list['KernelLeaf']:
    convs = [conv for conv in _training_forms(model) if conv.is_held_in_training]
    with torch.enable_grad(), torch.inference_mode(False):
        fresh = [conv for conv in convs if not _is_held(conv)]
        for conv in fresh:
            if conv.training_scope is not None:
                conv.training_scope.forget(conv)
        kernels = None
        if recorded is not None:
            device, dtype = next(model.parameters()).device.type, None
            # The remaining leaves belong to data parallelism, which fixes their dtype.
            is_reduced = any(conv.training_scope is not None for conv in fresh)
            if torch.is_autocast_enabled(device) and not is_reduced:
                dtype = torch.get_autocast_dtype(device)
            kernels = recorded.fold(fresh, dtype)
        if kernels is None:
            kernels = tuple(conv.folded_kernel() for conv in fresh)
        for conv, kernel in zip(fresh, kernels):
            leaf = conv.training_scope
            if leaf is None:
                parameter = nn.Parameter(kernel.detach())
                leaf = conv.training_scope = KernelLeaf(parameter, is_reduced=False)
            elif not leaf.parameter.requires_grad:
                name = next(name for name, m in model.named_modules() if m is conv)
                raise RuntimeError(
                    f'{name} was frozen when the model was wrapped for data '
                    'parallelism, and is trained now: its gradients would not be '
                    'averaged. Freeze it after that, with find_unused_parameters=True '
                    'in model_wrapper_cfg'
                )
            leaf.serve(kernel, conv)
    leaves = [conv.training_scope for conv in convs]
    for leaf in leaves:
        leaf.depth += 1
    return leaves


def _is_held(conv: ReparamConv2d) -> bool:
    leaf = conv.training_scope
    return leaf is not None and leaf.depth > 0 and leaf.sources is not None


@torch.compiler.disable
def backward_to_branches(leaves: list['KernelLeaf']) -> None:
    """Backpropagates the gradients of held kernels to the branches.

    ``dL/dθ += Jᵀ · dL/dW`` with ``J = dW/dθ``, and ``dL/dW`` is taken from the leaves.
    """
    leaves = [leaf for leaf in leaves if leaf.parameter.grad is not None]
    gradients = [leaf.parameter.grad for leaf in leaves]
    for leaf in leaves:
        leaf.parameter.grad = None
    kernels = [leaf.graph.kernel for leaf in leaves]
    # The caller may run another backward pass through the same forward pass.
    torch.autograd.backward(kernels, gradients, retain_graph=True)


class KernelGraph:
    """The graph that connects the leaf of a folded kernel with the branches.

    The hook of the leaf refers to this object, and Python's garbage collector does not
    see that reference. So this object must not refer to the leaf: both would leak.
    """

    kernel: Tensor  # The values of the leaf, as a function of the branches.
    is_deferred = False  # Whether backward_to_branches() is called afterwards.

    def __init__(self, is_reduced: bool) -> None:
        self.is_reduced = is_reduced  # Whether data parallelism averages the gradient.

    def on_gradient(self, leaf: nn.Parameter) -> None:
        """Passes the gradient of the leaf on to the branches, unless deferred."""
        if self.is_deferred:
            return
        gradient, leaf.grad = leaf.grad, None
        if self.is_reduced:
            raise RuntimeError(
                'with FoldedDistributedDataParallel, gradients reach the branches '
                'through optim_wrapper.update_params(loss) or .backward(loss) of a '
                'Folded...OptimWrapper, and loss.backward() was called by hand. Wrap '
                'the model in MMDistributedDataParallel for a loop of your own'
            )
        torch.autograd.backward(self.kernel, gradient, retain_graph=True)


class KernelLeaf:
    """The training scope of one conv: a kernel that is a leaf of the autograd graph.

    Args:
        parameter (nn.Parameter): The conv runs with this.
        is_reduced (bool): Whether data parallelism averages the gradient. If so, every
            block reuses this object; otherwise one block does. Defaults to True.

    Attributes:
        graph (KernelGraph): Passes the gradient of the kernel on to the branches.
        sources (Sources, optional): The folded parameters; None once the conv changed.
        depth (int): The number of open blocks.
        awaits_sync (bool): Whether data parallelism averages the gradient later, as in
            :meth:`~torch.nn.parallel.DistributedDataParallel.no_sync`.
    """

    def __init__(self, parameter: nn.Parameter, is_reduced: bool = True) -> None:
        self.parameter = parameter
        self.is_reduced = is_reduced
        self.graph = KernelGraph(is_reduced)
        self.sources: Optional[Sources] = None
        self.depth = 0
        self.awaits_sync = False
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(self.graph.on_gradient)

    def serve(self, kernel: Tensor, conv: ReparamConv2d) -> None:
        """Gives the conv this kernel, which has a graph, from now on."""
        self.graph.kernel, self.sources = kernel, Sources(conv)
        self.dtype = next(conv.branches.parameters()).dtype
        if self.is_reduced:
            self.parameter.data = kernel.detach()
            # Autograd must refuse a graph that used the former values.
            torch.autograd.graph.increment_version(self.parameter)

    def kernel(self, conv: ReparamConv2d) -> Optional[Tensor]:
        """The parameter in passes with gradients in the block, None in other passes."""
        if not torch.is_grad_enabled() or self.sources is None:
            return None
        # Activation checkpointing repeats a forward pass inside of the backward pass,
        # possibly after the block.
        if self.depth == 0 and torch._C._current_graph_task_id() == -1:
            # No backward pass runs, so this is a new pass outside of the block.
            self.forget(conv)
            return None
        # The guards of a compiler notice by themselves if a parameter is replaced.
        if not torch.compiler.is_compiling() and not self.sources.are_current():
            return None
        # Code that turns autocast off needs the dtype of the branches.
        kernel = self.parameter
        if kernel.dtype == self.dtype or torch.is_autocast_enabled(kernel.device.type):
            return kernel
        return kernel.to(self.dtype)

    def forget(self, conv: ReparamConv2d) -> None:
        """Stops serving the kernel, because the conv has changed."""
        self.sources = None
        if not self.is_reduced:
            conv.training_scope = None

    def has_final_gradient(self) -> bool:
        """Whether the gradient is complete and can be passed on to the branches."""
        return not self.awaits_sync and self.parameter.grad is not None


def _training_forms(model: nn.Module) -> list[ReparamConv2d]:
    return [
        module
        for module in model.modules()
        if isinstance(module, ReparamConv2d) and not module.deployed
    ]
