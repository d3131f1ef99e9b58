"""Weight decay of equivalent kernels instead of their branches."""

from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ...analysis import unwrapped
from ...layers import ReparamConv2d, outermost


@HOOKS.register_module()
class EquivalentKernelDecayHook(Hook):
    """Adds ``½ · weight_decay · Σ ‖K‖²`` over the equivalent kernels to the losses.

    It generalises RepVGG's "custom L2" to every block, see
    :meth:`mmorepa.layers.ReparamConv2d.regularized_kernel`. The log has it as
    ``loss_kernel_decay``. Its purpose is a narrow range of the kernels for
    quantisation. It **did not help** INT8 in the trainings of docs/int8.md. With 0.01,
    trainings of deep linear stems diverged.

    Set ``branch_decay_mult=0.`` of :class:`mmorepa.engine.OREPAOptimWrapperConstructor`
    as well. Otherwise the optimizer's weight decay applies to the branches, too.

    Args:
        weight_decay (float): The coefficient. Defaults to 1e-4.

    Raises:
        ValueError: If the model has no re-parameterised conv that is trained.

    Examples:
        >>> custom_hooks = [dict(type='EquivalentKernelDecayHook', weight_decay=1e-4)]
        >>> optim_wrapper = dict(
        ...     constructor='OREPAOptimWrapperConstructor',
        ...     paramwise_cfg=dict(branch_decay_mult=0.0),
        ... )
    """

    def __init__(self, weight_decay: float = 1e-4) -> None:
        self.weight_decay = weight_decay
        self._handle: Optional[Any] = None

    def before_train(self, runner: Runner) -> None:
        """Adds the term to the model's losses."""
        model = unwrapped(runner.model)
        if not _trained_convs(model):
            raise ValueError(
                'EquivalentKernelDecayHook has no effect: the model has no '
                're-parameterised conv that is trained'
            )
        self.after_train(runner)  # An earlier training may have ended by an error.
        # As a loss of the forward pass, it works in every toolbox, with AMP and with
        # gradient accumulation, and it is logged.
        self._handle = model.register_forward_hook(self._add_loss, with_kwargs=True)

    def after_train(self, runner: Runner) -> None:
        """Removes the term."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add_loss(
        self, model: nn.Module, args: tuple, kwargs: dict, losses: Any
    ) -> Any:
        if kwargs.get('mode') != 'loss':
            return losses
        squares = sum(
            conv.regularized_kernel().square().sum() for conv in _trained_convs(model)
        )
        return dict(losses, loss_kernel_decay=0.5 * self.weight_decay * squares)


def _trained_convs(model: nn.Module) -> list[ReparamConv2d]:
    return [
        conv
        for _, conv in outermost(model)
        if any(p.requires_grad and p.dim() > 1 for p in conv.parameters())
    ]
