"""The folds of a whole model and their derivative, recorded once and replayed.

On a GPU, a fold is little work in many small operations, and the time goes into calling
them. Parameters, kernels and gradients keep their addresses from step to step, and the
host reads none of them. So the operations are recorded as two CUDA graphs, one for
each direction, and two calls replay them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Optional, Protocol

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.weak import WeakIdKeyDictionary

from ..functional import is_being_traced
from .conv import ReparamConv2d
from .folding import are_the_same


class Recorder(Protocol):
    """Records operations."""

    def refusal(self, device: torch.device) -> str:
        """Why it cannot record there now, or nothing."""

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Runs and records.

        Args:
            run (Callable): Its operations read and write the same memory each time.

        Returns:
            tuple[Any, Callable]: What ``run()`` returned, and a function that writes
            the results anew, to the same memory.
        """


class CUDAGraphRecorder:
    """Records CUDA graphs, whose memory is one pool."""

    WARM_UP = 3

    def __init__(self) -> None:
        self._pool: Any = None

    def refusal(self, device: torch.device) -> str:
        """Why it cannot record on a device now, or nothing."""
        if device.type != 'cuda':
            return f'the branches are on {device}, and only CUDA has graphs'
        if torch.cuda.is_current_stream_capturing():
            return 'somebody else is recording'
        return ''

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """See :class:`Recorder`."""
        # Libraries choose their algorithms, and constants are made, in the first runs.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin the memory of the next batch meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, capture_error_mode='thread_local'
        ):
            results = run()
        return results, graph.replay


class _Recording:
    """What is recorded for some convs.

    Attributes:
        kernels (list[Tensor]): Those that a replay of the fold writes, without a graph.
        incoming (list[Tensor]): The gradients of the kernels, to be written to.
        outgoing (list[Tensor | None]): The gradients of :attr:`trained`, which a replay
            of the derivative writes; None for what no kernel depends on.
        trained (list[nn.Parameter]): What the kernels are folded from, if it is
            trained.
        is_current (bool): False once others are recorded, or none.
        owners (list[list[int]]): For each of them, the kernels that it is part of.
    """

    def __init__(
        self,
        convs: Sequence[ReparamConv2d],
        dtype: Optional[torch.dtype],
        recorder: Recorder,
        fold_all: Callable[[Sequence[ReparamConv2d]], list[Tensor]],
    ) -> None:
        self.is_current = True
        self.convs = list(convs)
        self.settings = _settings(convs, dtype)
        # What a change of an address, a dtype or the like is seen by.
        self._tensors = _tensors(convs)
        self._marks = [_mark(tensor) for tensor in self._tensors]
        self._versions = self._count_writes()
        owners: dict[nn.Parameter, list[int]] = {}
        for i, conv in enumerate(convs):
            for parameter in conv.branches.parameters():
                if parameter.requires_grad:
                    owners.setdefault(parameter, []).append(i)
        self.trained, self.owners = list(owners), list(owners.values())

        def run_fold() -> list[Tensor]:
            with torch.enable_grad():
                kernels = fold_all(convs)
                if dtype is not None:
                    kernels = [kernel.to(dtype) for kernel in kernels]
                return kernels

        # Kept: the recorded derivative reads what this graph has saved.
        self._graph, self.replay_fold = recorder.record(run_fold)
        self.kernels = [kernel.detach() for kernel in self._graph]
        self.incoming = [torch.zeros_like(kernel) for kernel in self.kernels]

        def run_gradients() -> list[Optional[Tensor]]:
            gradients = torch.autograd.grad(
                self._graph,
                self.trained,
                self.incoming,
                retain_graph=True,
                allow_unused=True,
            )
            return [_like(g, p) for g, p in zip(gradients, self.trained)]

        self.outgoing, self.replay_gradients = recorder.record(run_gradients)

    def _count_writes(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]

    def has_changed(self) -> bool:
        """Whether the branches were written to since the last call."""
        before, self._versions = self._versions, self._count_writes()
        return before != self._versions

    @torch.no_grad()
    def pass_on(self, gradients: dict[int, Tensor]) -> None:
        """Adds ``Jᵀ · gradient`` to the gradients of the branches, by a replay.

        Args:
            gradients (dict[int, Tensor]): Those of the kernels, by their number.
                Branches of a kernel that has none get none.
        """
        for i, incoming in enumerate(self.incoming):
            if i not in gradients:
                incoming.zero_()
        torch._foreach_copy_(
            [self.incoming[i] for i in gradients], list(gradients.values())
        )
        used = [
            (parameter, new)
            for parameter, new, owners in zip(self.trained, self.outgoing, self.owners)
            if new is not None and not gradients.keys().isdisjoint(owners)
        ]
        for parameter, new in used:
            old = parameter.grad
            if old is not None and old.data_ptr() == new.data_ptr():
                parameter.grad = old.clone()  # The replay writes to this memory.
        self.replay_gradients()
        sums = [(p.grad, new) for p, new in used if p.grad is not None]
        for parameter, new in used:
            if parameter.grad is None:
                parameter.grad = new
        if sums:
            torch._foreach_add_([old for old, _ in sums], [new for _, new in sums])

    def fits(
        self, convs: Sequence[ReparamConv2d], dtype: Optional[torch.dtype]
    ) -> bool:
        """Whether a replay gives what these convs would give."""
        tensors = _tensors(convs)
        return (
            are_the_same(convs, self.convs)
            and are_the_same(tensors, self._tensors)
            and self.settings == _settings(convs, dtype)
            and self._marks == [_mark(tensor) for tensor in tensors]
        )


class RecordedFolds:
    """Folds of a model's convs that are recorded, and replayed while nothing changes.

    A change of an address, a dtype, a device, ``requires_grad`` or of the set of convs
    records anew. What cannot be recorded is folded as ever, and one line in the log
    says why.

    The kernels, and the gradients that the branches get, are always the same memory: a
    reference to ``parameter.grad`` holds the gradient of the last step only, unless it
    is cloned.

    Args:
        recorder (Recorder, optional): Defaults to CUDA graphs.
        is_compiled (bool): Whether ``torch.compile`` fuses the operations before they
            are recorded. Defaults to False.
    """

    def __init__(
        self, recorder: Optional[Recorder] = None, is_compiled: bool = False
    ) -> None:
        self._recorder = recorder or CUDAGraphRecorder()
        self._fold_all = (
            torch.compile(_fold_all, dynamic=False) if is_compiled else _fold_all
        )
        self._recording: Optional[_Recording] = None
        self._told: set[str] = set()
        self._failure = ''
        # The leaves whose memory a replay writes.
        self._leaves: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.count = 0

    def fold(
        self, convs: Sequence[ReparamConv2d], dtype: Optional[torch.dtype] = None
    ) -> Optional[_Recording]:
        """Folds convs by a replay.

        Args:
            convs (Sequence[ReparamConv2d]): In training form.
            dtype (torch.dtype, optional): Of the kernels. Defaults to that of the
                branches.

        Returns:
            _Recording | None: It has the kernels. None where they have to be folded
            as ever.
        """
        if not convs:
            return None
        reason = self._failure or self._refusal(convs)
        if not reason and not self._is_current(convs, dtype):
            self._drop()  # Its memory is free for the next one.
            try:
                self._recording = _Recording(
                    convs, dtype, self._recorder, self._fold_all
                )
                self.count += 1
            except RuntimeError as error:
                # What CUDA refuses once, it would refuse in every step.
                reason = self._failure = str(error).partition('\n')[0] or repr(error)
        if reason:
            self._drop()
            self._tell_once(f'The fold is not captured: {reason}')
            return None
        recording = self._recording
        assert recording is not None
        if recording.has_changed():
            # A graph that used the former numbers must not go on with these.
            for leaf in self._leaves:
                torch.autograd.graph.increment_version(leaf)
            self._leaves.clear()
        recording.replay_fold()
        return recording

    def lend(self, leaf: Tensor) -> None:
        """Remembers a leaf that has the memory of a kernel."""
        self._leaves[leaf] = True

    def _drop(self) -> None:
        if self._recording is not None:
            self._recording.is_current = False
            self._recording = None

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            print_log(text, logger='current', level=logging.WARNING)

    def _is_current(
        self, convs: Sequence[ReparamConv2d], dtype: Optional[torch.dtype]
    ) -> bool:
        return self._recording is not None and self._recording.fits(convs, dtype)

    def _refusal(self, convs: Sequence[ReparamConv2d]) -> str:
        if is_being_traced():
            return 'a compiler or a tracer follows the operations'
        if torch.is_anomaly_enabled():
            return 'anomaly detection looks at every operation'
        devices = set()
        for conv in convs:
            for module in conv.branches.modules():
                if module._forward_pre_hooks or module._forward_hooks:
                    return f'{type(module).__name__} has hooks, or pruned weights'
                if is_parametrized(module):
                    return f'{type(module).__name__} has parametrizations'
                for parameter in module._parameters.values():
                    if parameter is None:
                        continue
                    devices.add(parameter.device)
                    if _has_hooks(parameter):
                        return 'parameters of branches have hooks'
                    if type(parameter) is not nn.Parameter:
                        return f'the branches are of type {type(parameter).__name__}'
        if len(devices) != 1:
            return f'the branches are on {len(devices)} devices'
        return self._recorder.refusal(devices.pop())


def _fold_all(convs: Sequence[ReparamConv2d]) -> list[Tensor]:
    return [conv.folded_kernel() for conv in convs]


def _tensors(convs: Sequence[ReparamConv2d]) -> list[Tensor]:
    return [
        tensor
        for conv in convs
        for tensor in (*conv.branches.parameters(), *conv.branches.buffers())
    ]


def _settings(convs: Sequence[ReparamConv2d], dtype: Optional[torch.dtype]) -> tuple:
    """What changes the operations, besides the branches."""
    formats = tuple(conv.memory_format for conv in convs)
    return dtype, torch.get_float32_matmul_precision(), formats


def _mark(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.stride()


def _has_hooks(parameter: Tensor) -> bool:
    return bool(
        parameter._backward_hooks
        or getattr(parameter, '_post_accumulate_grad_hooks', None)
    )


def _like(gradient: Optional[Tensor], parameter: Tensor) -> Optional[Tensor]:
    """A gradient with the strides of its parameter, as fused optimizers want it."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
