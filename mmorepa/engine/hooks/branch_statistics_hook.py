"""Statistics of the branches during training, for TensorBoard and similar tools."""

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
    """Writes statistics of the branches of each layer to all visualizer backends.

    The factors of a deep linear conv are layers ``NAME.1``, ``NAME.2``, …, which share
    one ``kernel_step``. Only the main process writes, and the training is unchanged.

    - ``branch_share/LAYER/BRANCH``: see :attr:`mmorepa.analysis.Share.size`
    - ``branch_scale/LAYER/BRANCH``: root mean square of the scaling vector of the
      branch, or of ``γ/√(σ²+ε)`` of its BatchNorm
    - ``kernel_step/LAYER``: :func:`mmorepa.analysis.relative_step` of the folded kernel
      in this step of the optimizer, also of convs with a single branch

    Args:
        interval (int): Steps between two measurements. With gradient accumulation, it
            must be a multiple of ``accumulative_counts``. Defaults to 200.

    Raises:
        ValueError: If the interval is not positive, or the model has no
            re-parameterised conv in training form.

    Examples:
        >>> custom_hooks = [dict(type='BranchStatisticsHook')]
        >>> vis_backends = [dict(type='LocalVisBackend'),
        ...                 dict(type='TensorboardVisBackend')]
    """

    # This hook runs before LoggerHook, after which the backends write their files.
    priority = 'NORMAL'

    def __init__(self, interval: int = 200) -> None:
        if interval < 1:
            raise ValueError(f'interval is at least 1, found {interval}')
        self.interval = interval
        self._before: dict[str, Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        if not _kernels(runner):
            raise ValueError(
                'BranchStatisticsHook has nothing to measure: the model has no '
                're-parameterised conv in training form'
            )

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
