"""Plain classifiers of torchvision, timm and mmpretrain."""

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from mmengine.config import ConfigDict
from torch import Tensor, nn

from ..backbones import OREPARepVGG, OREPAResNet, StagedBackbone
from ..layers import outermost
from ..utils.errors import CheckpointError, describe_misfit
from .plain import plain_names

# Arguments that mmpretrain's networks have under the same names,
_SHARED = (
    *('depth', 'in_channels', 'strides', 'dilations', 'out_indices', 'norm_cfg'),
    *('style', 'deep_stem', 'avg_down'),
)
# and those without effect on the outputs in eval mode.
_WITHOUT_EFFECT = (
    *('block', 'block_cfg', 'stem_block', 'stem_block_cfg', 'deploy', 'init_cfg'),
    *('frozen_stages', 'norm_eval', 'with_cp', 'zero_init_residual', 'drop_path_rate'),
)


def classifier_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the entries of a classifier the names that they have in mmpretrain.

    These are ``backbone.*`` and ``head.fc.*``, of a classifier of torchvision, timm or
    mmpretrain, with or without ``module.`` and ``backbone.`` before its keys.
    """
    entries = {}
    for key, value in state_dict.items():
        name = key.removeprefix('module.').removeprefix('backbone.')
        if re.fullmatch(r'fc\.\w+', name):
            name = f'head.{name}'
        elif not name.startswith(('head.', 'neck.')):
            name = f'backbone.{name}'
        entries[name] = value
    return entries


def start_from_plain(model: nn.Module, state_dict: Mapping[str, Tensor]) -> int:
    """Makes a classifier compute what a plain one computes.

    Args:
        model (nn.Module): A classifier of mmpretrain with a backbone of ours and a
            linear head, in training form or deployed.
        state_dict (Mapping[str, Tensor]): See :func:`classifier_entries`.

    Returns:
        int: How many convs took a plain kernel.

    Raises:
        CheckpointError: If it is no plain classifier's, or another one's; the keys, or
            the numbers of classes, are named.
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
    entries = classifier_entries(state_dict)
    biases = ('.stem.bias', '.branch_reparam.bias')
    is_deployed = any(key.endswith(biases) for key in entries)
    if is_deployed or any('.branches.' in key for key in entries):
        raise CheckpointError(
            f'the checkpoint is {"deployed" if is_deployed else "a training form"} '
            'already, and not of a plain network: it loads as it is into such a config'
        )
    _check_head(model, entries)
    count = len(list(outermost(model)))
    loaded = model.load_state_dict(entries, strict=False)
    problems = describe_misfit(
        dict.fromkeys(loaded.missing_keys, ()),
        dict.fromkeys(loaded.unexpected_keys, ()),
    )
    if problems:
        raise CheckpointError(f'the checkpoint does not fit the config: {problems}')
    return count


def _check_head(model: nn.Module, entries: Mapping[str, Tensor]) -> None:
    instead = (
        "start the backbone alone, by init_cfg=dict(type='Pretrained', "
        'checkpoint=...), and train a new head'
    )
    keys = ('head.fc.weight', 'head.fc.bias')
    missing = [key for key in keys if key not in entries]
    if missing:
        raise CheckpointError(
            f'the checkpoint has no classifier ({", ".join(missing)} missing): '
            f'{instead}'
        )
    classes, ours = len(entries[keys[0]]), model.head.fc.out_features
    if classes != ours:
        raise CheckpointError(
            f'the classifier is for {classes} classes, and that of the config for '
            f'{ours}: set model.head.num_classes={classes}, or {instead}'
        )


def entries_of_twin(
    twin: nn.Module, backbone: StagedBackbone, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gives the entries of a classifier the names that they have in :func:`plain_twin`.

    torchvision, timm and mmpretrain have several names for one tensor; they meet in the
    one that it has here. Those that the twin does not have keep their names.

    Args:
        twin (nn.Module): Built of :func:`plain_twin`.
        backbone (StagedBackbone): That of the classifier.
        state_dict (Mapping[str, Tensor]): As of :func:`classifier_entries`.
    """
    entries = classifier_entries(state_dict)
    twins = {ours: key for key, ours in _names(backbone, twin.state_dict()).items()}
    names = _names(backbone, entries)
    return {twins.get(names[key], key): value for key, value in entries.items()}


def _names(backbone: StagedBackbone, keys: Collection[str]) -> dict[str, str]:
    """Our names of the entries of a classifier, by their keys."""
    theirs = {key: key.removeprefix('backbone.') for key in keys}
    ours = plain_names(backbone, theirs.values())
    return {key: ours.get(name, name) for key, name in theirs.items()}


def plain_twin(model: Mapping) -> dict:
    """The config of a classifier with mmpretrain's own network as the backbone.

    It shares no code with ours. ValueError says that mmpretrain has no such network.
    """
    model = copy.deepcopy(ConfigDict(model))
    options = {k: v for k, v in model.backbone.items() if k not in _WITHOUT_EFFECT}
    is_resnet = options.pop('type') == OREPAResNet.__name__
    stages = options.pop('num_stages', 4)
    shared = {name: options.pop(name) for name in _SHARED if name in options}
    twin = (_resnet if is_resnet else _repvgg)(options, stages)
    unknown = sorted(name for name, value in options.items() if value)
    if unknown:
        raise ValueError(
            f'mmpretrain has no plain network with {", ".join(unknown)} '
            '(backbone of the config), to verify the outputs against'
        )
    for name in shared.keys() & {'strides', 'dilations'}:
        shared[name] = shared[name][:stages]
    model.backbone = {'out_indices': tuple(range(stages)), **twin, **shared}
    return model


def _resnet(options: dict[str, Any], stages: int) -> dict:
    """Type and widths in mmpretrain; takes what they are made of out of ``options``."""
    mult, base = options.pop('width_mult', 1), options.pop('base_channels', 64)
    stem = int((options.pop('stem_channels', None) or base) * mult)
    base = int(base * mult)
    groups = options.pop('groups', 1)
    width = base * options.pop('width_per_group', 64) // 64
    if (options.get('act_cfg') or {}).get('type', 'ReLU') == 'ReLU':
        options.pop('act_cfg', None)
    twin = dict(
        type='mmpretrain.ResNet',
        num_stages=stages,
        stem_channels=stem,
        base_channels=base,
    )
    if groups > 1:
        twin.update(type='mmpretrain.ResNeXt', groups=groups, width_per_group=width)
    elif width != base:  # Wide networks: the same outputs of a broader bottleneck.
        twin.update(base_channels=width, expansion=4 * base // width)
    return twin


def _repvgg(options: dict[str, Any], stages: int) -> dict:
    """As :func:`_resnet`."""
    arch, base = options.pop('arch'), options.pop('base_channels', 64)
    arch = OREPARepVGG.ARCHITECTURES[arch] if isinstance(arch, str) else arch
    depths = arch['num_blocks'][:stages]
    every_second = range(2, sum(depths) + 1, 2)
    twin = dict(
        type='mmpretrain.RepVGG',
        arch=dict(
            num_blocks=depths,
            width_factor=arch['widths'][:stages],
            stem_channels=base,
            group_layer_map=dict.fromkeys(every_second, arch.get('groups', 1)),
            se_cfg=dict(ratio=16, divisor=1) if arch.get('use_se') else None,
        ),
        base_channels=base,
    )
    act_cfg = options.pop('act_cfg', None)
    return dict(twin, act_cfg=act_cfg) if act_cfg else twin
