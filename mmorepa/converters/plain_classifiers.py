"""Loads plain classifiers of torchvision, timm and mmpretrain."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..backbones import StagedBackbone
from ..layers import outermost
from ..utils.errors import CheckpointError
from .checkpoint import load_strictly


def start_from_plain(model: nn.Module, state_dict: Mapping[str, Tensor]) -> int:
    """Makes a classifier compute the same as a plain classifier.

    Args:
        model (nn.Module): A classifier of mmpretrain with a backbone of this package
            and a linear head, in training form or deployed.
        state_dict (Mapping[str, Tensor]): The weights of a classifier of torchvision,
            timm or mmpretrain; keys may start with ``module.`` or ``backbone.``.

    Returns:
        int: The number of convs that start from a plain kernel.

    Raises:
        CheckpointError: If the state dict is not of a plain classifier, or does not fit
            the model. The error names the entries that do not fit.
        ValueError: If ``model`` is not such a classifier.
    """
    backbone = getattr(model, 'backbone', None)
    head = getattr(getattr(model, 'head', None), 'fc', None)
    if not isinstance(backbone, StagedBackbone) or not isinstance(head, nn.Linear):
        raise ValueError(
            'the config needs an OREPAResNet or OREPARepVGG as its backbone, and a '
            f'linear head (LinearClsHead), found {type(backbone).__name__} and '
            f'{type(head).__name__}; other models load plain checkpoints as they are '
            '(load_from, init_cfg)'
        )
    entries = _named_as_in_mmpretrain(state_dict)
    biases = ('.stem.bias', '.branch_reparam.bias')
    is_deployed = any(key.endswith(biases) for key in entries)
    if is_deployed or any('.branches.' in key for key in entries):
        raise CheckpointError(
            f'the checkpoint is {"deployed" if is_deployed else "a training form"} '
            'already, and not of a plain network: it loads as it is into such a config'
        )
    load_strictly(model, entries)
    return len(list(outermost(model)))


def _named_as_in_mmpretrain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Makes every key start with ``backbone.``, ``neck.`` or ``head.``."""
    entries = {}
    for key, value in state_dict.items():
        name = key.removeprefix('module.').removeprefix('backbone.')
        if re.fullmatch(r'fc\.\w+', name):
            name = f'head.{name}'
        elif not name.startswith(('head.', 'neck.')):
            name = f'backbone.{name}'
        entries[name] = value
    return entries
