"""Checks of weights that hold for any network."""

import logging
from collections.abc import Mapping
from typing import Optional

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

_WEIGHTS = ('weight', 'bias', 'running_mean', 'running_var', 'scale', 'vector')
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The list of errors of the last load that warned. All modules of one load_state_dict()
# get the same list, so that each load warns once. This reference keeps the list alive,
# since a later list could have the same id().
_warned: Optional[list] = None


def describe_damage(key: str, value: Tensor) -> str:
    """Describes the damage of an entry of a state dict, or returns ''.

    The text follows the key in an error. The name of the key shows whether the entry is
    a weight or a variance.
    """
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return 'is sparse, quantised or without values'
    entry = key.rpartition('.')[-1]
    if value.dtype not in _FLOATS:
        is_weight = entry in _WEIGHTS or entry.startswith('weight_')
        return f'holds {value.dtype}, where weights are' if is_weight else ''
    if key.endswith('rbr_dense.vector'):
        # The published code never writes the sixth row.
        value = value[:5]
    # Attention masks contain -Inf.
    if 'mask' not in key and not value.isfinite().all():
        return 'holds NaN' if value.isnan().any() else 'holds Inf'
    if entry == 'running_var' and (value < 0).any():
        return 'holds a negative variance'
    return ''


def warn_of_damage(
    state_dict: Mapping[str, Tensor], prefix: str, error_msgs: list[str]
) -> None:
    """Warns once per load if entries under a prefix are damaged.

    All modules of one load get the same ``error_msgs``.
    """
    global _warned
    if _warned is error_msgs:
        return
    for key, value in state_dict.items():
        # Subclasses of Tensor may be parts of tensors on other processes.
        if not key.startswith(prefix) or type(value) not in (Tensor, nn.Parameter):
            continue
        words = '' if value.is_meta else describe_damage(key, value)
        if words:
            _warned = error_msgs
            print_log(
                f'The weights that are loaded are damaged, or the training has '
                f"diverged: '{key}' {words}",
                logger='current',
                level=logging.WARNING,
            )
            return
