"""Scopes that fold a model's kernels once and serve them until they end.

Without one, every forward pass folds. Nothing else is remembered, so nothing can be
out of date outside of a scope. A conv asks its ``training_scope`` first, a
:class:`KernelLeaf`, and then its ``evaluation_scope``, an :class:`EvaluationScope`.
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
from .folding import are_the_same, double, fuse_norm, named_tensors

FusedConv = tuple[Tensor, Optional[Tensor], Optional[nn.Module]]


@contextmanager
def folded(model: nn.Module, in_traces: bool = False) -> Iterator[nn.Module]:
    """Folds every conv of a model once, and serves that until the end of the block.

    For loops of evaluation: a conv in eval mode, without gradients, runs as the plain
    conv that it equals, BatchNorm included. Elsewhere its kernel is folded once, with a
    gradient where one is asked for. A conv folds when it first runs. What is written to
    a parameter or a BatchNorm inside of the block after that is not seen;
    :meth:`~torch.nn.Module.train`, :meth:`~torch.nn.Module.eval`, loading a state dict
    and moving the model are. A block is for one backward pass. Of nested blocks, the
    outermost one counts.

    Args:
        model (nn.Module): A layer or a whole model, wrapped or not.
        in_traces (bool): Whether a tracer sees finished kernels too, rather than the
            fold. Defaults to False.

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
            if isinstance(conv, ReparamConv2d):  # Or it has been deployed.
                conv.evaluation_scope = None


class Sources:
    """The tensors and modules of a conv, in whose place a call may put others."""

    def __init__(self, conv: ReparamConv2d) -> None:
        modules = list(conv.modules())
        names = ('_parameters', '_buffers', '_modules')
        places = [vars(module)[name] for module in modules for name in names]
        self._places = [(place, [*place.values()]) for place in places if place]

    def are_current(self) -> bool:
        """Whether the conv has these very ones, and not just equal ones."""
        return all(
            are_the_same([*place.values()], sources) for place, sources in self._places
        )


class EvaluationScope:
    """The folds of one conv; each is made when it is first asked for."""

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
        """Kernel and bias in eval mode, with the norm that is not fused into them.

        None if the conv has to run as it is.
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
        if '_is_replica' in vars(conv):  # Of DataParallel, for one forward pass.
            return make()
        folds = self._folds
        if folds is None or not (is_being_traced() or folds[0].are_current()):
            folds = self._folds = Sources(conv), {}
        by_name = folds[1]
        if name not in by_name:
            # Outside of inference mode, whose tensors could serve nothing else.
            with torch.inference_mode(False), torch.set_grad_enabled(with_grad):
                by_name[name] = make()
        return by_name[name]


def _fused_conv(conv: ReparamConv2d) -> Optional[FusedConv]:
    # A BatchNorm may be in another mode than the conv that it belongs to, and somebody
    # may be waiting for its inputs or outputs.
    inner = list(conv.modules())[1:]
    if conv.deployed or overridden_fold(conv) or any(map(_must_run, inner)):
        return None
    bias = None if conv.bias is None else double(conv.bias)
    if conv.folds_online:
        # Fast, in the precision that training forms run in.
        like = conv.folded_kernel()
        kernel = double(like)
    else:
        kernel, bias = conv.branches_kernel_bias(bias)
        # A branch may have no parameter (an average), or those of norms.
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
    """Folds the trained kernels of a model, and cuts the graph there.

    Inside of the block, passes with gradients see each kernel as a leaf, an ordinary
    plain weight, folded at the beginning of the outermost block. Its gradient goes on
    to the branches in the same backward pass or, if :attr:`KernelGraph.is_deferred`,
    when :func:`backward_to_branches` is called.

    Args:
        model (nn.Module): Wrapped for data parallelism or not.
        recorded (RecordedFolds, optional): Replays the fold of all kernels, whose
            leaves have the dtype of autocast where that is on. Defaults to None.

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
            # What is left is of data parallelism, which counts on its dtype.
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
            elif not leaf.leaf.requires_grad:
                name = next(name for name, m in model.named_modules() if m is conv)
                raise RuntimeError(
                    f'{name} was frozen when the model was wrapped for data '
                    'parallelism, and is trained now: its gradients would not be '
                    'averaged. Freeze it after that, with find_unused_parameters=True '
                    'in model_wrapper_cfg'
                )
            leaf.take(kernel, conv)
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
    leaves = [leaf for leaf in leaves if leaf.leaf.grad is not None]
    gradients = [leaf.leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.leaf.grad = None
    kernels = [leaf.graph.kernel for leaf in leaves]
    # There may be another backward pass through the same forward pass.
    torch.autograd.backward(kernels, gradients, retain_graph=True)


class KernelGraph:
    """The graph that connects the leaf of a folded kernel with the branches.

    The leaf's hook holds this object, invisibly to Python's garbage collector. A
    reference back would leak both.
    """

    kernel: Tensor  # The leaf's numbers, as a function of the branches.
    is_deferred = False  # Whether backward_to_branches() is called afterwards.

    def __init__(self, is_reduced: bool) -> None:
        self.is_reduced = is_reduced  # By data parallelism, after a backward pass.

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
    """The training scope of one conv: a kernel cut off from its branches.

    Args:
        leaf (nn.Parameter): What the conv runs with.
        is_reduced (bool): Whether data parallelism averages its gradients, and it
            serves all blocks. Others serve one block. Defaults to True.

    Attributes:
        graph (KernelGraph): What turns its gradient into those of the branches.
        sources (Sources, optional): What it is folded from; none once that has changed.
        depth (int): The number of open blocks.
        awaits_sync (bool): Whether data parallelism does not average its gradient in
            this pass, as in :meth:`~torch.nn.parallel.DistributedDataParallel.no_sync`.
    """

    def __init__(self, leaf: nn.Parameter, is_reduced: bool = True) -> None:
        self.leaf = leaf
        self.is_reduced = is_reduced
        self.graph = KernelGraph(is_reduced)
        self.sources: Optional[Sources] = None
        self.depth = 0
        self.awaits_sync = False
        if leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(self.graph.on_gradient)

    def take(self, kernel: Tensor, conv: ReparamConv2d) -> None:
        """Serves this kernel of the conv, with a graph, from now on."""
        self.graph.kernel, self.sources = kernel, Sources(conv)
        self.dtype = next(conv.branches.parameters()).dtype
        if self.is_reduced:
            self.leaf.data = kernel.detach()
            # A graph that used the former numbers must not go on with these.
            torch.autograd.graph.increment_version(self.leaf)

    def kernel(self, conv: ReparamConv2d) -> Optional[Tensor]:
        """The leaf for passes with gradients in the block, and None for others."""
        if not torch.is_grad_enabled() or self.sources is None:
            return None
        # Checkpointed blocks run their forward pass again in the backward one.
        if self.depth == 0 and torch._C._current_graph_task_id() == -1:
            # Passes outside of the block fold, and so do their checkpointed parts
            # when they run again.
            self.forget(conv)
            return None
        # A compiler takes parameters for granted.
        if not torch.compiler.is_compiling() and not self.sources.are_current():
            return None
        # A leaf in half precision may be used where autocast is off for a while.
        leaf = self.leaf
        if leaf.dtype == self.dtype or torch.is_autocast_enabled(leaf.device.type):
            return leaf
        return leaf.to(self.dtype)

    def forget(self, conv: ReparamConv2d) -> None:
        """Serves the conv no longer, since it has changed."""
        self.sources = None
        if not self.is_reduced:
            conv.training_scope = None

    def has_final_gradient(self) -> bool:
        """Whether the leaf's gradient can be passed on to the branches."""
        return not self.awaits_sync and self.leaf.grad is not None


def _training_forms(model: nn.Module) -> list[ReparamConv2d]:
    return [
        module
        for module in model.modules()
        if isinstance(module, ReparamConv2d) and not module.deployed
    ]
