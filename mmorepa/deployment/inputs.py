"""Images to compare and to measure networks with."""

import copy
from typing import Optional

from mmengine.config import Config
from torch import nn

from ..engine.config import build_loader

DEFAULT_SIZE = 224


def test_batch(cfg: Config) -> Optional[dict]:
    """A batch of the test data.

    Args:
        cfg (Config): Of a model and its data.

    Returns:
        dict | None: As the dataloader yields it; None without data on this machine.
    """
    if cfg.get('test_dataloader') is None:
        return None
    try:
        return next(iter(build_loader(cfg, 'test')))
    except FileNotFoundError:
        return None


def image_size(model: nn.Module, batch: Optional[dict]) -> tuple[int, int]:
    """The size of images as a network sees them.

    Args:
        model (nn.Module): With the preprocessor of its toolbox.
        batch (dict, optional): Of the test data.

    Returns:
        tuple[int, int]: Height and width; 224 and 224 without a batch.
    """
    if batch is None:
        return DEFAULT_SIZE, DEFAULT_SIZE
    inputs = model.data_preprocessor(copy.deepcopy(batch), False)['inputs']
    return tuple(inputs.shape[-2:])
