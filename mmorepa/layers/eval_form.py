"""Evaluation at deployed speed, without a switch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from .online_fold import Watch, tensors_outside

Conv = tuple[Tensor, Optional[Tensor]]

_is_on = True


class EvalForm:
    """The plain conv that a training form equals in eval mode, while it equals it.

    Kernel and bias, normalisation folded in, are kept until a parameter or a running
    statistic of the module changes, which is found as :class:`.OnlineFold` finds it.
    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._watch: Optional[Watch] = None
        self._conv: Optional[Conv] = None

    def __call__(self, module: nn.Module, fuse: Callable[[], Conv]) -> Optional[Conv]:
        """Returns ``fuse()``, computed afresh only if need be.

        Args:
            module (nn.Module): What the result depends on.
            fuse (Callable): Returns kernel and bias.

        Returns:
            tuple[Tensor, Tensor | None] | None: Shapes (O, Ig, k, k) and (O,); None
            where the training form has to run.
        """
        if (
            not _is_on
            or torch.is_grad_enabled()
            # Compilers and tracers see the branches.
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or any(_must_run(child, module) for child in module.modules())
        ):
            return None
        if self._watch is None or not self._watch.is_current(module):
            self.clear()
            if next(tensors_outside(module), None) is not None:
                return None  # They cannot be watched.
            # Outside of inference mode, whose tensors could serve nothing else.
            with torch.inference_mode(False), torch.no_grad():
                self._conv = fuse()
            self._watch = Watch(module)
        return self._conv

    def clear(self) -> None:
        """Forgets the conv."""
        self._watch = self._conv = None

    def __reduce__(self) -> tuple:
        return EvalForm, ()


def _must_run(child: nn.Module, module: nn.Module) -> bool:
    # A BatchNorm may be in another mode than the conv that it belongs to, and
    # somebody may be waiting for its inputs or outputs.
    return child.training or (
        child is not module and bool(child._forward_hooks or child._forward_pre_hooks)
    )


@contextmanager
def branch_by_branch() -> Iterator[None]:
    """Makes training forms run as they train, normalisation and all.

    A comparison of the two forms would otherwise compare a fold with a fold.

    Examples:
        >>> with branch_by_branch(), torch.no_grad():
        ...     expected = model(x)
    """
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before
