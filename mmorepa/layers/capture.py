"""The folds of a whole model and their derivative, recorded once and replayed.

On a GPU, a fold is little work in many small operations, and the time goes into calling
them. Parameters, kernels and gradients keep their addresses from step to step, and the
host reads none of them. So the operations are recorded as two CUDA graphs, one for
each direction, and two calls replay them.
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
from .param_groups import watch

# The arguments of fold().
Part = tuple[nn.Module, torch.memory_format]


class RecordedFolds:
    """Folds of a model's convs that are recorded, and replayed while nothing changes.

    A change of an address, a dtype, a device, ``requires_grad`` or of the set of convs
    records anew. Where nothing can be recorded, one line in the log says why. The
    kernels are always the same memory.

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
        """The kernels of training forms, by a replay, with a graph.

        They have another dtype than the branches where one is given. None where they
        cannot be recorded.
        """
        if not convs:
            return None
        reason = self._failure or _reason_not_to_record(convs)
        state = None if reason else _state(convs, dtype)
        if state and (self._recording is None or self._recording.state != state):
            self._drop()  # Its memory is free for the next one.
            try:
                self._recording = _Recording(convs, dtype, self._fold_all)
                self.count += 1
            except RuntimeError as error:
                # What CUDA refuses once, it would refuse in every step.
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

    A replay of the fold writes ``kernels``. One of the derivative reads their
    gradients, ``incoming``, and writes those of ``trained`` to ``outgoing``.

    It has no reference to the convs, which have the leaves, whose graphs refer to it.
    """

    def __init__(
        self,
        convs: Sequence[ReparamConv2d],
        dtype: Optional[torch.dtype],
        fold_all: Callable[[Sequence[Part], Optional[torch.dtype]], list[Tensor]],
    ) -> None:
        self.is_current = True  # False once others are recorded, or none.
        self.state = _state(convs, dtype)
        self.dtype = dtype
        self.parts = [(conv.branches, conv.memory_format) for conv in convs]
        for conv in convs:
            watch(conv.branches)
        self.tensors = _tensors(convs)
        self._versions = [tensor._version for tensor in self.tensors]
        parameters = (p for conv in convs for p in conv.branches.parameters())
        self.trained = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        # Kept: the recorded derivative reads what this graph has saved.
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
        """Lets autograd refuse graphs that used kernels which a replay writes over."""
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
        # Frozen ones too, which the derivative reads as well.
        ctx.save_for_backward(*recording.tensors)
        ctx.set_materialize_grads(False)
        recording.refuse_former_graphs()
        recording.replay_fold()
        return tuple(kernel.detach() for kernel in recording.kernels)

    @staticmethod
    def backward(ctx, *gradients: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        recording = ctx.recording
        _ = ctx.saved_tensors  # Refuses those that were written to.
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if len(given) < len(gradients) or not recording.is_current:
            # The derivative of a part, or at addresses that may be others' by now.
            parts = [recording.parts[i] for i in given]
            found = torch.autograd.grad(
                _fold_all(parts, recording.dtype),
                recording.trained,
                [gradients[i] for i in given],
                allow_unused=True,
            )
            return None, *found
        torch._foreach_copy_(recording.incoming, list(gradients))
        recording.replay_gradients()
        # Copies, since the next replay writes to this memory.
        return None, *torch._foreach_mul(recording.outgoing, 1)


def record(run: Callable[[], list]) -> tuple[list, Callable[[], None]]:
    """Runs operations, and records them as a CUDA graph.

    Returns what ``run()`` returned, and a function that writes these results anew, to
    the same memory.
    """
    # Libraries choose their algorithms, and constants are made, in the first runs.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may pin the memory of the next batch meanwhile.
    with torch.cuda.graph(graph, capture_error_mode='thread_local'):
        results = run()
    return results, graph.replay


def can_record_on(device: torch.device) -> bool:
    """Whether operations on a device are those that a CUDA graph records now."""
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
    # They would run in the recorded derivative, and again for what it returns.
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
    """All that the recorded operations depend on, but for the numbers."""
    return [
        dtype,
        torch.get_float32_matmul_precision(),
        *((id(conv.branches), conv.memory_format) for conv in convs),
        *(
            (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.stride())
            for t in _tensors(convs)
        ),
    ]
