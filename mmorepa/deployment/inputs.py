"""Images for comparing and measuring networks."""

import copy
from collections.abc import Sequence
from typing import Optional

from mmengine.config import Config
from torch import nn

from ..layers import ReparamConv2d
from ..runs import build_loader

DEFAULT_SIZE = 224


def test_batch(cfg: Config) -> Optional[dict]:
    """A batch of the test data, or None if this machine does not have the data."""
    if cfg.get('test_dataloader') is None:
        return None
    try:
        return next(iter(build_loader(cfg, 'test')), None)
    except OSError:  # There is no folder, no file or no right to read it.
        return None


def image_shape(
    model: nn.Module, batch: Optional[dict], size: Optional[Sequence[int]] = None
) -> tuple[int, int, int]:
    """Channels, height and width of an image as a network sees it.

    Without a ``size`` (height, width), the batch gives the size, or else it is 224×224.
    Without a batch, the first conv gives the number of channels.
    """
    if batch is not None:
        inputs = model.data_preprocessor(copy.deepcopy(batch), False)['inputs']
        channels, *default = inputs.shape[1:]
    else:
        kinds = (nn.Conv2d, ReparamConv2d)
        convs = (module for module in model.modules() if isinstance(module, kinds))
        first = next(convs, None)
        channels, default = getattr(first, 'in_channels', 3), [DEFAULT_SIZE] * 2
    return (channels, *(size or default))
