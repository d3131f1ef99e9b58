"""Folded training: the fold outside of the graph, once per forward pass."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Union
from weakref import WeakKeyDictionary, WeakSet

import torch
from mmengine.logging import print_log
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
    folded kernels as ordinary leaf parameters of a plain network. After a backward
    pass, their gradients are passed on to the branches: ``dL/dθ = Jᵀ · dL/dW``. This is
    linear in the gradient, and ``J`` is the same on every process. So the result is
    that of online folding, also with gradient accumulation, loss scaling, clipping and
    data parallelism.

    Args:
        *args, **kwargs: See the base class.
        capture (bool | str): Whether the fold and its derivative are recorded as CUDA
            graphs, see :class:`mmorepa.layers.RecordedFolds`. With ``'compiled'``,
            ``torch.compile`` fuses their operations before. Defaults to False.
    """

    def __init__(self, *args, capture: Union[bool, str] = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if capture not in (False, True, 'compiled'):
            raise ValueError(f"capture is True, False or 'compiled', found {capture!r}")
        self._capture = capture
        self._has_warned = False
        self.__setstate__({})

    def __getstate__(self) -> dict:
        # A copy starts without them, since they belong to the model of the original.
        not_copied = ('_recorded', '_kernels')
        return {k: v for k, v in vars(self).items() if k not in not_copied}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._recorded: WeakKeyDictionary[nn.Module, RecordedFolds] = (
            WeakKeyDictionary()
        )
        # The kernels to which a loss may still propagate gradients.
        self._kernels: WeakSet[KernelLeaf] = WeakSet()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Holds the kernels in the forward pass; some model wrappers fold online."""
        if folds_online(model):
            if not self._has_warned:
                self._has_warned = True
                print_log(
                    f'{type(model).__name__} trains with online folding. With '
                    "model_wrapper_cfg=dict(type='FoldedDistributedDataParallel') it "
                    'would train folded, and reduce the gradients of a plain network',
                    logger='current',
                    level=logging.WARNING,
                )
            with super().optim_context(model):
                yield
            return
        recorded = self._recorded.get(model)
        if recorded is None and self._capture:
            recorded = RecordedFolds(is_compiled=self._capture == 'compiled')
            self._recorded[model] = recorded
        # The base class comes first, since its context turns autocast on.
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
                kernel.parameter.grad = None
            raise
        finally:
            for kernel in kernels:
                kernel.graph.is_deferred = False
        # A gradient that data parallelism has not averaged yet must wait for that.
        backward_to_branches(
            [kernel for kernel in kernels if kernel.has_final_gradient()]
        )

    def zero_grad(self, **kwargs) -> None:
        """Clears the pending gradients of held kernels as well."""
        super().zero_grad(**kwargs)
        for kernel in self._kernels:
            kernel.parameter.grad = None


def folds_online(model: nn.Module) -> bool:
    """Whether a model has a wrapper that prevents folded training."""
    return is_model_wrapper(model) and not isinstance(
        model, FoldedDistributedDataParallel
    )


@OPTIM_WRAPPERS.register_module()
class FoldedOptimWrapper(_FoldedTraining, OptimWrapper):
    """Folded training in full precision.

    One line in a config chooses it. Checkpoints are the same as with online folding,
    and each resumes from those of the other.

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
