"""What the branches do while they train, for TensorBoard and its like."""

import math
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from ...analysis import branch_kernels, relative_step, shares, unwrapped
from ...layers import MultiBranchConv2d, ReparamConv2d, outermost


@HOOKS.register_module()
class BranchStatisticsHook(Hook):
    """Writes what the branches of each layer do to every backend of the visualizer.

    The factors of a deep linear conv are layers ``NAME.1``, ``NAME.2``, …, with one
    step of all. Only the main process writes, and the training stays as it is.

    - ``branch_share/LAYER/BRANCH``: see :attr:`mmorepa.analysis.Share.size`
    - ``branch_scale/LAYER/BRANCH``: root mean square of its scaling vector, or of
      ``γ/√(σ²+ε)`` of its BatchNorm
    - ``kernel_step/LAYER``: :func:`mmorepa.analysis.relative_step` of the folded kernel
      in this step of the optimizer, also of plain convs

    Args:
        interval (int): Steps between two measurements; with gradient accumulation, a
            multiple of its counts. Defaults to 200.

    Examples:
        >>> custom_hooks = [dict(type='BranchStatisticsHook')]
        >>> vis_backends = [dict(type='LocalVisBackend'),
        ...                 dict(type='TensorboardVisBackend')]
    """

    # Before LoggerHook: backends write out what they have when it has logged.
    priority = 'NORMAL'

    def __init__(self, interval: int = 200) -> None:
        self.interval = interval
        self._before: dict[str, Tensor] = {}

    @master_only
    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._before = _kernels(runner)

    @master_only
    def after_train_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        if not self.every_n_train_iters(runner, self.interval):
            return
        scalars = {
            f'kernel_step/{name}': relative_step(self._before[name], kernel)
            for name, kernel in _kernels(runner).items()
        }
        self._before = {}
        for layer in branch_kernels(unwrapped(runner.model), torch.float32):
            for branch, share in shares(layer.kernels).items():
                scale = layer.scales[branch].square().mean().sqrt().item()
                scalars[f'branch_share/{layer.name}/{branch}'] = share.size
                scalars[f'branch_scale/{layer.name}/{branch}'] = scale
        finite = {
            name: value for name, value in scalars.items() if math.isfinite(value)
        }
        runner.visualizer.add_scalars(finite, step=runner.iter + 1)


@torch.no_grad()
def _kernels(runner: Runner) -> dict[str, Tensor]:
    """Copies of the folded kernels, by name."""
    return {
        name: _kernel(conv).clone()
        for name, conv in outermost(unwrapped(runner.model))
        if not conv.deployed
    }


def _kernel(conv: ReparamConv2d) -> Tensor:
    if isinstance(conv, MultiBranchConv2d):
        return conv.equivalent_kernel_bias()[0]
    return conv.folded_kernel()
