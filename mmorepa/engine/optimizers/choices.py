"""Chooses how a model is trained if the config does not: folds, memory, updates."""

from typing import Optional, Union

from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...functional import compiled
from ...layers import faster_in_channels_last, outermost, set_channels_last
from ...layers.exchange import has_branches
from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .folded_optim_wrapper import (
    FoldedAmpOptimWrapper,
    FoldedBFloat16OptimWrapper,
    FoldedOptimWrapper,
    folds_online,
)

FOLDED = {
    OptimWrapper: FoldedOptimWrapper,
    AmpOptimWrapper: FoldedAmpOptimWrapper,
    BFloat16OptimWrapper: FoldedBFloat16OptimWrapper,
}


def wrapper_class(cfg: dict) -> Optional[type]:
    """The class of an optimizer wrapper's config; None if there is no such class."""
    kind = cfg.get('type', 'OptimWrapper')
    return OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind


def choose_memory_format(
    model: nn.Module, channels_last: Union[bool, str], is_half: bool
) -> list[nn.Module]:
    """Chooses the memory format, and returns the modules that have channels last.

    ``'auto'`` takes the format that was measured to be faster. ``is_half`` is True for
    mixed precision. Wrapped models are not changed.
    """
    if any(map(is_model_wrapper, model.modules())):
        # DDP has made buckets for gradients in the former memory format.
        if channels_last is True:
            raise ValueError(
                'channels_last=True comes too late for a model that is wrapped: '
                'call mmorepa.set_channels_last(model) before the wrapper'
            )
        return []
    if channels_last == 'auto':
        is_cpu = next(model.parameters()).device.type == 'cpu'
        parts = faster_in_channels_last(model) if is_cpu or is_half else []
    else:
        parts = [model] if channels_last else []
        set_channels_last(model, channels_last)
    for part in parts:
        set_channels_last(part)
    return parts


def log_choices(
    wrapper: OptimWrapper, model: nn.Module, kernels: int, parts: list[nn.Module]
) -> None:
    """Logs in one line how the model will be trained."""
    mode = f'{kernels} kernels folded outside of the graph'
    if not kernels:
        mode = 'no kernels to fold'
    elif not isinstance(wrapper, tuple(FOLDED.values())):
        mode = f'{kernels} kernels folded online, at every forward pass'
    elif folds_online(model):
        mode = f'{kernels} kernels folded online, because of {type(model).__name__}'
    device = next(model.parameters()).device.type
    folds = 'compiled for this CPU' if compiled.is_available() else 'not compiled'
    if device != 'cpu':
        folds = f'as operations on {device}'
    update = 'fused' if wrapper.optimizer.defaults.get('fused') else 'not fused'
    names = ', '.join(type(part).__name__ for part in parts) or 'nothing'
    convs = [conv for _, conv in outermost(model, _ConvNd)]
    reparameterized = sum(has_branches(conv) for conv in convs)
    logger = MMLogger.get_current_instance()
    if not reparameterized and any(getattr(c, 'deployed', False) for c in convs):
        logger.warning(
            f'{type(model).__name__} trains in its deployed form, without '
            'branches: build it without deploy=True to train it re-parameterised'
        )
    logger.info(
        f'{type(wrapper).__name__}: {mode} (folds {folds}; '
        f'{type(wrapper.optimizer).__name__} {update}; channels last in {names}); '
        f'{reparameterized} of {len(convs)} convs are re-parameterised'
    )
