"""Folded training: the fold outside of the graph, once per forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Union
from weakref import WeakKeyDictionary, WeakSet

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from ...layers import KernelLeaf, RecordedFolds, backward_to_branches, held
from ..distributed import FoldedDistributedDataParallel
from .bfloat16_optim_wrapper import BFloat16OptimWrapper


class _FoldedTraining:
    """A mixin that adds folded training to an optimizer wrapper.

    The fold does not depend on the data. So forward and backward passes run on the
    folded kernels as ordinary leaf parameters of a plain network, and after a backward
    pass their gradients are passed on to the branches: ``dL/dθ = Jᵀ · dL/dW``. This is
    linear in the gradient, with the same ``J`` on every process, so that the result is
    that of online folding under gradient accumulation, loss scaling, clipping and data
    parallelism too.

    Args:
        *args, **kwargs: See the base class.
        capture (bool | str): Whether the fold and its derivative are recorded as CUDA
            graphs, see :class:`mmorepa.layers.RecordedFolds`; ``'compiled'`` fuses
            their operations before by ``torch.compile``. Defaults to False.
    """

    def __init__(self, *args, capture: Union[bool, str] = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if capture not in (False, True, 'compiled'):
            raise ValueError(f"capture is True, False or 'compiled', found {capture!r}")
        self._capture = capture
        self._recorded: WeakKeyDictionary[nn.Module, RecordedFolds] = (
            WeakKeyDictionary()
        )
        # Those that a loss may still lead to.
        self._kernels: WeakSet[KernelLeaf] = WeakSet()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Holds the kernels in the forward pass; some model wrappers fold online."""
        if folds_online(model):
            with super().optim_context(model):
                yield
            return
        recorded = self._recorded.get(model)
        if recorded is None and self._capture:
            recorded = RecordedFolds(is_compiled=self._capture == 'compiled')
            self._recorded[model] = recorded
        # In this order: the context of the base class turns autocast on.
        with super().optim_context(model), held(model, recorded) as kernels:
            self._kernels.update(kernels)
            yield

    @torch.compiler.disable
    def backward(self, loss: Tensor, **kwargs) -> None:
        """Passes the gradients on to the branches as well."""
        kernels = list(self._kernels)
        for kernel in kernels:
            kernel.graph.is_deferred = True
        try:
            super().backward(loss, **kwargs)
        except BaseException:
            for kernel in kernels:
                kernel.leaf.grad = None
            raise
        finally:
            for kernel in kernels:
                kernel.graph.is_deferred = False
        # Those that data parallelism has not averaged yet wait for the others.
        backward_to_branches(
            [kernel for kernel in kernels if kernel.has_final_gradient()]
        )

    def zero_grad(self, **kwargs) -> None:
        """Clears the pending gradients of held kernels as well."""
        super().zero_grad(**kwargs)
        for kernel in self._kernels:
            kernel.leaf.grad = None


def folds_online(model: nn.Module) -> bool:
    """Whether a wrapper keeps a model from folded training."""
    return is_model_wrapper(model) and not isinstance(
        model, FoldedDistributedDataParallel
    )


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
    """Folded training in mixed precision with loss scaling, as ``AmpOptimWrapper``."""


@OPTIM_WRAPPERS.register_module()
class FoldedBFloat16OptimWrapper(_FoldedTraining, BFloat16OptimWrapper):
    """Folded training in bfloat16, on the CPU too."""
