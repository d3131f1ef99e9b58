"""Tests the deployed form of a model."""

from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...analysis import largest_difference, raw_outputs, unwrapped, watched_convs
from ...layers import is_switchable, switch_to_deploy


@HOOKS.register_module()
class SwitchToDeployHook(Hook):
    """Switches the model to its plain form before it is tested.

    At the first test batch, after an ``EMAHook`` has put its averages in place, every
    re-parameterised conv of the model and of the EMA's copy becomes a plain one. Then
    the outputs of both forms are compared. After a failed comparison, the runner keeps
    the deployed model. Validation switches nothing. ``python -m mmorepa deploy`` writes
    the deployed form of a checkpoint.

    Args:
        tolerance (float, optional): The largest accepted difference of the raw outputs,
            relative to the largest value. None skips the comparison. Defaults to 1e-4.

    Raises:
        RuntimeError: In a test, if the outputs differ by more than the tolerance.

    Examples:
        >>> custom_hooks = [dict(type='SwitchToDeployHook')]
    """

    priority = 'VERY_LOW'

    def __init__(self, tolerance: Optional[float] = 1e-4) -> None:
        self.tolerance = tolerance

    def before_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        if batch_idx != 0:
            return
        if not is_switchable(runner.model):
            runner.logger.info(
                'Nothing to switch: the model is deployed, or it has no '
                're-parameterised conv.'
            )
            return
        if self.tolerance is None:
            self._switch(runner)
            runner.logger.info('Switched the model to its deployed form.')
            return
        with watched_convs(unwrapped(runner.model)) as layers:
            before = raw_outputs(runner.model, data_batch)
        self._switch(runner)
        difference = largest_difference(before, raw_outputs(runner.model, data_batch))
        runner.logger.info(
            'Switched the model to its deployed form; largest difference of the '
            f'outputs for the first batch: {difference}.'
        )
        # Not `>`, which is False for NaN.
        if not difference.relative <= self.tolerance:
            raise RuntimeError(
                'the deployed form differs from the training form: '
                f'{difference.relative:.2e} of the largest output, tolerance '
                f'{self.tolerance:.0e}; {self._blame(layers)}. With weights in half '
                "precision or running variances near zero, raise the hook's tolerance"
            )

    def _switch(self, runner: Runner) -> None:
        switch_to_deploy(runner.model)
        for hook in runner.hooks:
            ema_model = getattr(hook, 'ema_model', None)
            if isinstance(ema_model, nn.Module):
                switch_to_deploy(ema_model)

    def _blame(self, layers: dict[str, float]) -> str:
        """Names the first conv whose two forms differ for the same input."""
        for name, difference in layers.items():
            if not difference <= self.tolerance:
                return f'the first layer beyond it is {name!r}, with {difference:.2e}'
        return 'no re-parameterised conv is beyond it by itself'
