"""Converts a state dict to the form that a conv is in.

There are four forms: the branches of a block, the single kernel of a
:class:`~mmorepa.layers.PlainConv2d`, a plain conv with its norm, and a plain conv with
the norm folded in.
"""

import copy
import functools

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..utils.errors import CheckpointError
from .changes import check_foldable
from .folding import fuse_norm, to_float64
from .starting import load_norm

Entries = dict[str, Tensor]


def adapt(
    conv: nn.Conv2d,
    state_dict: Entries,
    prefix: str,
    error_msgs: list[str],
    assign: bool,
) -> bool:
    """Converts the entries of a conv in a state dict to the form that the conv is in.

    Args:
        conv (ReparamConv2d): If it is a training form, it starts from a plain kernel.
        state_dict (dict[str, Tensor]): Changed in place.
        prefix (str): The start of the keys of the conv.
        error_msgs (list[str]): Wrong shapes are appended here, for the loader.
        assign (bool): Whether the loader makes parameters of the entries. If so,
            computed entries get the dtype of the file; if not, the loader rounds them.

    Returns:
        bool: Whether the conv has started from a plain kernel.
    """
    keys = [key for key in state_dict if key.startswith(prefix)]
    entries = {key[len(prefix) :]: state_dict.pop(key) for key in keys}
    is_plain = conv.deployed or 'weight' in conv.branches._parameters
    if 'branches.weight' in entries and not is_plain:
        # The entries are of the training form of a PlainConv2d.
        entries['weight'] = entries.pop('branches.weight')
    dtypes = {key: value.dtype for key, value in entries.items()}
    has_branches = any(key.startswith('branches.') for key in entries)
    has_started = False
    try:
        if has_branches:
            if conv.deployed:
                entries = _folded(conv, entries, prefix)
        elif 'weight' in entries:
            if conv.deployed:
                _fuse_norm(conv, entries)
            else:
                has_started = _start(conv, entries, prefix, error_msgs)
    except ValueError as error:
        raise CheckpointError(
            f"{type(conv).__name__} cannot start from '{prefix}weight': {error}"
        ) from error
    kernels = [v for k, v in dtypes.items() if 'norm.' not in k and v.is_floating_point]
    for key, value in entries.items():
        if assign and kernels and value.is_floating_point():
            value = value.to(dtypes.get(key, kernels[0]))
        state_dict[prefix + key] = value
    return has_started


def _take_norm(entries: Entries) -> Entries:
    keys = [key for key in entries if key.startswith('norm.')]
    return {key.removeprefix('norm.'): entries.pop(key) for key in keys}


def _fuse_norm(conv: nn.Conv2d, entries: Entries) -> None:
    """Fuses the norm of a plain conv, for a deployed one."""
    weight = entries['weight']
    if 'bias' not in entries and getattr(conv, 'has_second_norm', False):
        # The deployed conv has a bias, from the norms of its branches.
        entries['bias'] = weight.new_zeros(conv.out_channels)
    if conv.norm is not None or conv.norm_cfg is None:
        return
    norm_entries = _take_norm(entries)
    if norm_entries:
        norm = build_norm_layer(conv.norm_cfg, conv.out_channels)[1]
        load_norm(norm, norm_entries)
        bias = to_float64(entries['bias']) if 'bias' in entries else None
        entries['weight'], entries['bias'] = fuse_norm(to_float64(weight), bias, norm)


def _start(
    conv: nn.Conv2d, entries: Entries, prefix: str, error_msgs: list[str]
) -> bool:
    """Starts a training form, and replaces the plain entries by its entries."""
    weight, bias = entries['weight'], entries.get('bias')
    has_norm = any(key.startswith('norm.') for key in entries)
    is_folded = conv.norm is not None or (conv.last_norms and not conv.conv_bias)
    if bias is not None and not has_norm and is_folded:
        raise ValueError(
            'it has a bias, so the BatchNorm is folded into it (a deployed '
            'checkpoint), while the training form has a BatchNorm. Build the model '
            'with deploy=True: take the config that was written beside the '
            'checkpoint, NAME_config.py, or add --cfg-options '
            'model.backbone.deploy=True to the command line; or call '
            'mmorepa.switch_to_deploy on the model before loading. Or load the '
            'checkpoint that this one was made from'
        )
    if any(parameter.is_meta for parameter in conv.branches.parameters()):
        raise ValueError(
            'its branches are on meta, and a start keeps what they were built '
            'with: build the model on a device that has memory'
        )
    del entries['weight']
    if weight.shape != conv.kernel_shape:
        # Report it in PyTorch's words. Some loaders then load the other entries.
        error_msgs.append(
            f'size mismatch for {prefix}weight: copying a param with shape '
            f'{weight.shape} from checkpoint, the shape in current model is '
            f'{torch.Size(conv.kernel_shape)}.'
        )
        entries.update(conv.branches.state_dict(prefix='branches.'))
        return False
    # The loader reports a bias that is missing or of another shape.
    has_bias = bias is not None and bias.shape == (conv.out_channels,)
    norm = _take_norm(entries)
    conv.start_from(weight, bias if has_bias else conv.bias, norm or None)
    for name, value in conv.state_dict().items():
        is_unknown = name == 'bias' and not has_bias
        if not is_unknown and (norm or not name.startswith('norm.')):
            entries[name] = value
    return True


def _folded(conv: nn.Conv2d, entries: Entries, prefix: str) -> Entries:
    """The entries of a training form, folded for a deployed conv."""
    twin = copy.deepcopy(conv)
    with torch.random.fork_rng(devices=[]):
        twin.become_training_form()
    for module in twin.modules():  # The outer load has warned already.
        module.warns_of_damage = False
    # Use the widest dtype of all, so that the result is rounded only once.
    dtypes = [v.dtype for v in entries.values() if v.is_floating_point()]
    twin.to(functools.reduce(torch.promote_types, dtypes, conv.weight.dtype))
    try:
        twin.load_state_dict(entries)
    except RuntimeError as error:
        raise CheckpointError(
            f"the training form under '{prefix}' cannot be folded while loading: "
            f'{error}'
        ) from error
    check_foldable(twin)
    kernel, bias = twin.equivalent_kernel_bias()
    folded = ('branches.', 'bias', *(['norm.'] if twin.fuses_norm else []))
    kept = {k: v for k, v in twin.state_dict().items() if not k.startswith(folded)}
    return {'weight': kernel, **({} if bias is None else {'bias': bias}), **kept}
