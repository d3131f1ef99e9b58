"""Plain classifiers of torchvision, timm and mmpretrain."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..backbones import StagedBackbone
from ..layers import outermost
from ..utils.errors import CheckpointError
from .checkpoint import load_strictly


def start_from_plain(model: nn.Module, state_dict: Mapping[str, Tensor]) -> int:
    """Makes a classifier compute what a plain one computes.

    Args:
        model (nn.Module): A classifier of mmpretrain with a backbone of ours and a
            linear head, in training form or deployed.
        state_dict (Mapping[str, Tensor]): That of a classifier of torchvision, timm or
            mmpretrain, with or without ``module.`` and ``backbone.`` before its keys.

    Returns:
        int: How many convs took a plain kernel.

    Raises:
        CheckpointError: If it is no plain classifier's, or another one's; what does not
            fit is named.
        ValueError: If the model is another kind of model.
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
    """With ``backbone.`` or ``head.`` before every key."""
    entries = {}
    for key, value in state_dict.items():
        name = key.removeprefix('module.').removeprefix('backbone.')
        if re.fullmatch(r'fc\.\w+', name):
            name = f'head.{name}'
        elif not name.startswith(('head.', 'neck.')):
            name = f'backbone.{name}'
        entries[name] = value
    return entries
