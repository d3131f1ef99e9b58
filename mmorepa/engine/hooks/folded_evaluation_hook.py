"""Validation and testing at the speed of the deployed form."""

from contextlib import ExitStack
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...layers import folded, log_plain_starts


@HOOKS.register_module()
class FoldedEvaluationHook(Hook):
    """Folds the model once for a validation or a test, see :func:`mmorepa.folded`.

    It folds at the first batch, after the loop has put the model in eval mode and an
    ``EMAHook`` has put its averages in place, and drops the kernels at the end of the
    loop. Before a training or a test, it logs how many convs started from plain
    kernels.

    Examples:
        >>> custom_hooks = [dict(type='FoldedEvaluationHook')]
    """

    # This hook runs after SwitchToDeployHook, which compares both forms of the model.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._scope = ExitStack()

    def before_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        if batch_idx == 0:
            self._scope.close()  # An exception may have left the last one open.
            self._scope.enter_context(folded(runner.model))

    before_test_iter = before_val_iter

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        self._scope.close()

    after_test_epoch = after_val_epoch

    def before_train(self, runner: Runner) -> None:
        self._scope.close()
        log_plain_starts(runner.model)

    def before_test(self, runner: Runner) -> None:
        log_plain_starts(runner.model)
