"""Scopes that fold a model's kernels once and serve them until they end.

Without one, every forward pass folds. Nothing else is remembered, so nothing can be
out of date outside of a scope.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Optional

import torch
from torch import Tensor, nn

from .reparam_conv import ReparamConv2d


@contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """Folds every conv of a model once, and serves that until the end of the block.

    For loops of evaluation: a conv in eval mode, without gradients, runs as the plain
    conv that it equals, BatchNorm included. Elsewhere its kernel is folded once, as
    :func:`torch.nn.utils.parametrize.cached` does it, with a gradient where one is
    asked for. A conv folds when it first runs. What is written to the model inside of
    the block after that, a parameter, a statistic or an attribute of a BatchNorm, is
    not seen; :meth:`~torch.nn.Module.train`, :meth:`~torch.nn.Module.eval`, loading a
    state dict and moving the model are.

    Blocks may be nested: the outermost one decides how long a fold is served.

    Args:
        model (nn.Module): A layer or a whole model, wrapped or not.

    Yields:
        nn.Module: The model.

    Examples:
        >>> with mmorepa.folded(model), torch.no_grad():
        ...     for batch in batches:
        ...         model(batch)
    """
    with ExitStack() as stack:
        for conv in _training_forms(model):
            stack.enter_context(conv.serve_folds())
        yield model


@contextmanager
def held(model: nn.Module) -> Iterator[list['KernelLeaf']]:
    """Folds the trained kernels of a model, and cuts the graph there.

    Inside of the block, passes with gradients see each kernel as a leaf, an ordinary
    plain weight. Its gradient goes on to the branches in the same backward pass or, if
    :attr:`KernelGraph.is_deferred`, when :func:`backward_to_branches` is called.

    The fold is that of the branches at the beginning of the block. A block inside of
    another one serves what that one holds.

    Args:
        model (nn.Module): Wrapped for data parallelism or not.

    Yields:
        list[KernelLeaf]: What is held.
    """
    found = _hold(model)
    try:
        yield found
    finally:
        for kernel in found:
            kernel.depth -= 1


# A compiler goes on behind it, with leaves for kernels.
@torch.compiler.disable
def _hold(model: nn.Module) -> list['KernelLeaf']:
    convs = [conv for conv in _training_forms(model) if conv.is_held_in_training]
    fresh = [c for c in convs if c.held is None or c.held.depth == 0]
    with torch.enable_grad(), torch.inference_mode(False):
        for conv in fresh:
            if conv.reduced_kernel is not None:
                _check_is_reduced(model, conv)
            conv.held = conv.reduced_kernel or KernelLeaf()
            conv.held.take(conv.folded_kernel(), tuple(conv.branches.parameters()))
    found = [conv.held for conv in convs]
    for kernel in found:
        kernel.depth += 1
    return found


@torch.compiler.disable
def backward_to_branches(kernels: list['KernelLeaf']) -> None:
    """Backpropagates the gradients of held kernels to the branches.

    ``dL/dθ += Jᵀ · dL/dW`` with ``J = dW/dθ``; the kernels' gradients are consumed.

    Args:
        kernels (list[KernelLeaf]): Those without a gradient are left out.
    """
    kernels = [kernel for kernel in kernels if kernel.leaf.grad is not None]
    gradients = [kernel.leaf.grad for kernel in kernels]
    for kernel in kernels:
        kernel.leaf.grad = None
    # There may be another backward pass through the same forward pass.
    torch.autograd.backward(
        [kernel.graph.kernel for kernel in kernels], gradients, retain_graph=True
    )


class KernelGraph:
    """The graph that connects the leaf of a folded kernel with the branches.

    The leaf refers to it, by a hook that no garbage collector looks into. So it does
    not refer to the leaf, or neither would ever be freed.

    Attributes:
        kernel (Tensor): The leaf's numbers, as a function of the branches.
        is_deferred (bool): Whether :func:`backward_to_branches` is called after the
            backward pass.
        is_reduced (bool): Whether data parallelism averages the leaf's gradient,
            which is done at the end of a backward pass only.
    """

    def __init__(self, is_reduced: bool) -> None:
        self.kernel: Optional[Tensor] = None
        self.is_deferred = False
        self.is_reduced = is_reduced

    def on_gradient(self, leaf: nn.Parameter) -> None:
        """Passes the leaf's gradient on to the branches, or leaves it to others."""
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
    """A folded kernel cut off from its branches: a leaf, and the graph behind it.

    Attributes:
        leaf (nn.Parameter): What the conv runs with.
        graph (KernelGraph): What turns its gradient into those of the branches.
        sources (tuple[nn.Parameter, ...]): The parameters that it is folded from.
        depth (int): The number of open blocks.
        awaits_sync (bool): Whether data parallelism does not average its gradient in
            this pass, as in :meth:`~torch.nn.parallel.DistributedDataParallel.no_sync`.
    """

    def __init__(self, leaf: Optional[nn.Parameter] = None) -> None:
        self.leaf = leaf
        self.graph = KernelGraph(is_reduced=leaf is not None)
        self.sources: tuple[nn.Parameter, ...] = ()
        self.depth = 0
        self.awaits_sync = False
        if leaf is not None and leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(self.graph.on_gradient)

    def take(self, kernel: Tensor, sources: tuple[nn.Parameter, ...]) -> None:
        """Serves this kernel from now on.

        Args:
            kernel (Tensor): With a graph.
            sources (tuple[nn.Parameter, ...]): What it is folded from.
        """
        self.graph.kernel, self.sources = kernel, sources
        if self.leaf is None:
            self.leaf = nn.Parameter(kernel.detach())
            self.leaf.register_post_accumulate_grad_hook(self.graph.on_gradient)
            return
        self.leaf.data = kernel.detach()
        # A graph that used the former numbers must not go on with these.
        torch.autograd.graph.increment_version(self.leaf)

    def is_served(self) -> bool:
        """Whether passes with gradients run with the leaf."""
        # Checkpointed blocks run their forward pass again in the backward one.
        return self.depth > 0 or torch._C._current_graph_task_id() != -1

    def was_folded_from(self, parameters: Iterable[Tensor]) -> bool:
        """Whether it is folded from these.

        It is not where others stand in their place for a call, as in
        :func:`torch.func.functional_call`.
        """
        parameters = tuple(parameters)
        return len(parameters) == len(self.sources) and all(
            one is other for one, other in zip(parameters, self.sources)
        )

    def has_final_gradient(self) -> bool:
        """Whether the leaf's gradient can be passed on to the branches."""
        return not self.awaits_sync and self.leaf.grad is not None


def _check_is_reduced(model: nn.Module, conv: ReparamConv2d) -> None:
    if not conv.reduced_kernel.leaf.requires_grad:
        name = next(name for name, m in model.named_modules() if m is conv)
        raise RuntimeError(
            f'{name} was frozen when the model was wrapped for data parallelism, and '
            'is trained now: its gradients would not be averaged. Freeze it after '
            'that, with find_unused_parameters=True in model_wrapper_cfg'
        )


def _training_forms(model: nn.Module) -> list[ReparamConv2d]:
    return [
        module
        for module in model.modules()
        if isinstance(module, ReparamConv2d) and not module.deployed
    ]
