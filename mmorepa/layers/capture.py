"""Records the folds of a whole model and their derivative once, and replays them.

A fold consists of many small operations, and a GPU spends most of the time on starting
them. Parameters, kernels and gradients keep their addresses from step to step, and the
host reads none of their values. So two CUDA graphs can record the operations, one the
folds and one the derivative, and two calls replay them.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..functional import is_being_traced
from .conv import ReparamConv2d
from .folding import fold
from .param_groups import warn_if_not_optimized

# The arguments of fold().
Part = tuple[nn.Module, torch.memory_format]


class RecordedFolds:
    """Records the folds of a model's convs, and replays them while nothing changes.

    If an address, a dtype, a device, ``requires_grad`` or the set of convs changes, it
    records again. If it cannot record, one line in the log says why. Every replay
    writes the kernels to the same memory.

    Args:
        is_compiled (bool): Whether ``torch.compile`` fuses the operations before they
            are recorded. Defaults to False.
    """

    def __init__(self, is_compiled: bool = False) -> None:
        self._fold_all = _fold_all
        if is_compiled:
            self._fold_all = torch.compile(_fold_all, dynamic=False)
        self._recording: Optional[_Recording] = None
        self._logged: set[str] = set()
        self._failure = ''
        self.count = 0  # How often the folds were recorded.

    def fold(
        self, convs: Sequence[ReparamConv2d], dtype: Optional[torch.dtype] = None
    ) -> Optional[tuple[Tensor, ...]]:
        """The kernels of training forms from a replay, with a graph.

        They have ``dtype``, or that of the branches if it is None. Returns None if the
        folds cannot be recorded.
        """
        if not convs:
            return None
        reason = self._failure or _reason_not_to_record(convs)
        state = None if reason else _state(convs, dtype)
        if state and (self._recording is None or self._recording.state != state):
            self._drop()  # The next recording can use the memory of this one.
            try:
                self._recording = _Recording(convs, dtype, self._fold_all)
                self.count += 1
            except RuntimeError as error:
                # CUDA would refuse this in every step, so do not try again.
                reason = self._failure = str(error).partition('\n')[0] or repr(error)
        if self._recording is not None and not reason:
            return _Replay.apply(self._recording, *self._recording.trained)
        self._drop()
        if reason not in self._logged:
            self._logged.add(reason)
            text = f'The fold is not captured: {reason}'
            print_log(text, logger='current', level=logging.WARNING)
        return None

    def _drop(self) -> None:
        if self._recording is not None:
            self._recording.is_current = False
            self._recording = None


class _Recording:
    """The recorded folds of some convs.

    A replay of the fold writes ``kernels``. A replay of the derivative reads the
    gradients of the kernels from ``incoming`` and writes the gradients of ``trained``
    to ``outgoing``.

    It must not refer to the convs. conv → leaf → graph → recording would be a cycle.
    """

    def __init__(
        self,
        convs: Sequence[ReparamConv2d],
        dtype: Optional[torch.dtype],
        fold_all: Callable[[Sequence[Part], Optional[torch.dtype]], list[Tensor]],
    ) -> None:
        self.is_current = True  # False once the recording is dropped.
        self.state = _state(convs, dtype)
        self.dtype = dtype
        self.parts = [(conv.branches, conv.memory_format) for conv in convs]
        for conv in convs:
            warn_if_not_optimized(conv.branches)
        self.tensors = _tensors(convs)
        self._versions = [tensor._version for tensor in self.tensors]
        parameters = (p for conv in convs for p in conv.branches.parameters())
        self.trained = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        # Keep this graph: the recorded derivative reads the tensors that it saved.
        self._graph, self.replay_fold = record(lambda: fold_all(self.parts, dtype))
        self.kernels = [kernel.detach() for kernel in self._graph]
        self.incoming = [torch.zeros_like(kernel) for kernel in self.kernels]
        self.outgoing, self.replay_gradients = record(
            lambda: list(
                torch.autograd.grad(
                    self._graph, self.trained, self.incoming, retain_graph=True
                )
            )
        )

    def refuse_former_graphs(self) -> None:
        """Makes autograd raise if a graph is used whose kernels a replay overwrote."""
        before = self._versions
        self._versions = [tensor._version for tensor in self.tensors]
        if before != self._versions:
            for kernel in self.kernels:
                torch.autograd.graph.increment_version(kernel)


class _Replay(torch.autograd.Function):
    """The kernels as a function of the trained parameters."""

    @staticmethod
    def forward(ctx, recording: _Recording, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        # Save the frozen tensors too, since the derivative reads them.
        ctx.save_for_backward(*recording.tensors)
        ctx.set_materialize_grads(False)
        recording.refuse_former_graphs()
        recording.replay_fold()
        return tuple(kernel.detach() for kernel in recording.kernels)

    @staticmethod
    def backward(ctx, *gradients: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        recording = ctx.recording
        _ = ctx.saved_tensors  # Raises if a tensor was written to.
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if len(given) < len(gradients) or not recording.is_current:
            # Some kernels have no gradient, or the recording was dropped and other
            # tensors may use its memory. Compute the derivative without it.
            parts = [recording.parts[i] for i in given]
            gradients_of_trained = torch.autograd.grad(
                _fold_all(parts, recording.dtype),
                recording.trained,
                [gradients[i] for i in given],
                allow_unused=True,
            )
            return None, *gradients_of_trained
        torch._foreach_copy_(recording.incoming, list(gradients))
        recording.replay_gradients()
        # Return copies, since the next replay writes to this memory.
        return None, *torch._foreach_mul(recording.outgoing, 1)


def record(run: Callable[[], list]) -> tuple[list, Callable[[], None]]:
    """Runs operations, and records them as a CUDA graph.

    Returns the results of ``run()``, and a function that computes the results again
    in the same memory.
    """
    # In the first runs, libraries choose their algorithms and constants are made.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Meanwhile, another thread may pin the memory of the next batch.
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):
        results = run()
    return results, graph.replay


def can_record_on(device: torch.device) -> bool:
    """Whether a CUDA graph would now record the operations on a device."""
    return device.type == 'cuda' and device.index == torch.cuda.current_device()


def _reason_not_to_record(convs: Sequence[ReparamConv2d]) -> str:
    if is_being_traced() or torch.is_anomaly_enabled():
        return 'a compiler, a tracer or anomaly detection follows the operations'
    modules = [module for conv in convs for module in conv.branches.modules()]
    if any(m._forward_pre_hooks or m._forward_hooks for m in modules):
        return 'branches have hooks'
    if any(map(is_parametrized, modules)):
        return 'branches compute their weights'
    tensors = _tensors(convs)
    # Hooks would run during the replay and again on the gradients that it returns.
    if any(tensor._backward_hooks for tensor in tensors):
        return 'parameters of branches have hooks'
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or not all(map(can_record_on, devices)):
        names = ', '.join(sorted(map(str, devices)))
        return f'the branches are on {names}, and not all on the current CUDA device'
    return ''


@torch.enable_grad()
def _fold_all(parts: Sequence[Part], dtype: Optional[torch.dtype]) -> list[Tensor]:
    kernels = [fold(*part) for part in parts]
    return kernels if dtype is None else [kernel.to(dtype) for kernel in kernels]


def _tensors(convs: Sequence[ReparamConv2d]) -> list[Tensor]:
    return [
        tensor
        for conv in convs
        for tensor in (*conv.branches.parameters(), *conv.branches.buffers())
    ]


def _state(convs: Sequence[ReparamConv2d], dtype: Optional[torch.dtype]) -> list[Any]:
    """Everything that the recorded operations depend on, except the values."""
    return [
        dtype,
        torch.get_float32_matmul_precision(),
        *((id(conv.branches), conv.memory_format) for conv in convs),
        *(
            (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.stride())
            for t in _tensors(convs)
        ),
    ]
