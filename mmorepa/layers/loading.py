"""What a conv makes of a state dict of another form than its own.

A form is the training form of its block, that of
:class:`~mmorepa.layers.PlainConv2d`, or a plain conv, with its norm or with the norm
folded in.
"""

import copy
import functools

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..utils.errors import CheckpointError
from .changes import check_foldable
from .folding import double, fuse_norm
from .starting import load_norm

Entries = dict[str, Tensor]


def adapt(
    conv: nn.Conv2d,
    state_dict: Entries,
    prefix: str,
    error_msgs: list[str],
    assign: bool,
) -> bool:
    """Gives the entries of a conv, in a state dict, the form that the conv is in.

    Args:
        conv (ReparamConv2d): A training form starts from a plain kernel here.
        state_dict (dict[str, Tensor]): Changed in place.
        prefix (str): That of the conv's keys.
        error_msgs (list[str]): Takes what is wrong with a shape, for the loader.
        assign (bool): Whether entries become parameters. Computed ones then have the
            dtype of the file; otherwise the loader rounds them once.

    Returns:
        bool: Whether the conv has started from a plain kernel.
    """
    keys = [key for key in state_dict if key.startswith(prefix)]
    entries = {key[len(prefix) :]: state_dict.pop(key) for key in keys}
    is_plain = conv.deployed or 'weight' in conv.branches._parameters
    if 'branches.weight' in entries and not is_plain:
        # The training form of a PlainConv2d, whose kernel is a parameter.
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
        # This one has a bias for the norms of its branches, and the plain one none.
        entries['bias'] = weight.new_zeros(conv.out_channels)
    if conv.norm is not None or conv.norm_cfg is None:
        return
    norm_entries = _take_norm(entries)
    if norm_entries:
        norm = build_norm_layer(conv.norm_cfg, conv.out_channels)[1]
        load_norm(norm, norm_entries)
        bias = double(entries['bias']) if 'bias' in entries else None
        entries['weight'], entries['bias'] = fuse_norm(double(weight), bias, norm)


def _start(
    conv: nn.Conv2d, entries: Entries, prefix: str, error_msgs: list[str]
) -> bool:
    """Starts a training form; its entries take the place of the plain ones."""
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
        # In PyTorch's words, and left to the loader: some go on with the rest.
        error_msgs.append(
            f'size mismatch for {prefix}weight: copying a param with shape '
            f'{weight.shape} from checkpoint, the shape in current model is '
            f'{torch.Size(conv.kernel_shape)}.'
        )
        entries.update(conv.branches.state_dict(prefix='branches.'))
        return False
    # What is missing or of another shape is reported as for any parameter.
    has_bias = bias is not None and bias.shape == (conv.out_channels,)
    norm = _take_norm(entries)
    conv.start_from(weight, bias if has_bias else conv.bias, norm or None)
    for name, value in conv.state_dict().items():
        is_left = name == 'bias' and not has_bias
        if not is_left and (norm or not name.startswith('norm.')):
            entries[name] = value
    return True


def _folded(conv: nn.Conv2d, entries: Entries, prefix: str) -> Entries:
    """The entries of a training form, folded for a deployed conv."""
    twin = copy.deepcopy(conv)
    with torch.random.fork_rng(devices=[]):
        twin.become_training_form()
    for module in twin.modules():  # A load within one that has warned.
        module.warns_of_flaws = False
    # In the widest dtype at hand, so that the result is rounded once.
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
    others = {k: v for k, v in twin.state_dict().items() if not k.startswith(folded)}
    return {'weight': kernel, **({} if bias is None else {'bias': bias}), **others}
