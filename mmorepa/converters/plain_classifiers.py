"""Plain classifiers of torchvision, timm and mmpretrain."""

import copy
import re
from collections.abc import Collection, Mapping

from mmengine.config import ConfigDict
from torch import Tensor, nn

from ..backbones import OREPARepVGG, OREPAResNet, StagedBackbone
from ..layers import outermost
from ..utils.errors import CheckpointError, describe_misfit
from .plain import plain_names

_HEAD = ('head.fc.weight', 'head.fc.bias')


def classifier_entries(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the entries of a classifier the names that they have in mmpretrain.

    Args:
        state_dict (Mapping[str, Tensor]): That of a classifier of torchvision, timm or
            mmpretrain, with or without ``module.`` and ``backbone.`` before its keys.

    Returns:
        dict[str, Tensor]: ``backbone.*`` and ``head.fc.*``.
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
    if not isinstance(backbone, StagedBackbone):
        raise ValueError(
            'the config needs an OREPAResNet or OREPARepVGG as its backbone, found '
            f'{type(backbone).__name__}; others load plain checkpoints as they are '
            '(load_from, init_cfg)'
        )
    if not isinstance(getattr(getattr(model, 'head', None), 'fc', None), nn.Linear):
        raise ValueError(
            'the config needs a classifier with a linear head (LinearClsHead); other '
            'models start their backbone by '
            "init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    entries = classifier_entries(state_dict)
    if any('.branches.' in key for key in entries):
        raise CheckpointError(
            'the checkpoint is a training form already: use it as it is (load_from)'
        )
    if any(key.endswith(('.stem.bias', '.branch_reparam.bias')) for key in entries):
        raise CheckpointError(
            'the checkpoint is deployed already: it loads as it is into a config with '
            'deploy=True, and no training form starts from it'
        )
    _check_head(model, entries)
    convs = list(outermost(model))
    # Not load_strictly(): the backbone has words of its own for another network.
    loaded = model.load_state_dict(entries, strict=False)
    keys = loaded.missing_keys, loaded.unexpected_keys
    problems = describe_misfit(*(dict.fromkeys(names, ()) for names in keys))
    if problems:
        raise CheckpointError(f'the checkpoint does not fit the config: {problems}')
    return len(convs)


def _check_head(model: nn.Module, entries: Mapping[str, Tensor]) -> None:
    instead = (
        "start the backbone alone, by init_cfg=dict(type='Pretrained', "
        'checkpoint=...), and train a new head'
    )
    missing = [key for key in _HEAD if key not in entries]
    if missing:
        raise CheckpointError(
            f'the checkpoint has no classifier ({", ".join(missing)}, or fc.*, '
            f'missing): {instead}'
        )
    theirs, ours = entries[_HEAD[0]].shape, model.head.fc.weight.shape
    # Of other features, it is another network's: the backbone has the words for that.
    if theirs[1:] == ours[1:] and theirs != ours:
        raise CheckpointError(
            f'the classifier is for {theirs[0]} classes, and that of the config for '
            f'{ours[0]}: set model.head.num_classes={theirs[0]}, or {instead}'
        )


def entries_of_twin(
    twin: nn.Module, backbone: StagedBackbone, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gives the entries of a classifier the names that they have in its plain twin.

    torchvision, timm and mmpretrain have several names for one tensor; they meet in the
    one that it has here.

    Args:
        twin (nn.Module): Built of :func:`plain_twin`.
        backbone (StagedBackbone): That of the classifier.
        state_dict (Mapping[str, Tensor]): See :func:`classifier_entries`.

    Returns:
        dict[str, Tensor]: Those that the twin does not have keep their names.
    """

    def our_names(keys: Collection[str]) -> dict[str, str]:
        """By their keys."""
        names = [key[len(start) :] for key in keys if key.startswith(start)]
        ours = plain_names(backbone, names)
        return {start + name: ours.get(name, name) for name in names}

    start = 'backbone.'
    entries = classifier_entries(state_dict)
    twins = {ours: key for key, ours in our_names(twin.state_dict()).items()}
    names = {key: twins.get(ours, key) for key, ours in our_names(entries).items()}
    return {names.get(key, key): value for key, value in entries.items()}


def plain_twin(model: Mapping) -> dict:
    """The config of a classifier with mmpretrain's own network as the backbone.

    It shares no code with ours.

    Args:
        model (Mapping): The config of a classifier with a backbone of ours.

    Returns:
        dict: Another config.

    Raises:
        ValueError: If mmpretrain has no such network.
    """
    model = copy.deepcopy(ConfigDict(model))
    kind, backbone = model.backbone.type, dict(model.backbone)
    unknown = {name for name in backbone if name not in _SHARED and backbone[name]}
    translate = _resnet if kind == OREPAResNet.__name__ else _repvgg
    twin, translated = translate(backbone)
    unknown -= {*_WITHOUT_EFFECT, *translated}
    if unknown:
        raise ValueError(
            f'mmpretrain has no plain network with {", ".join(sorted(unknown))} '
            '(backbone of the config), to verify the outputs against'
        )
    twin.update((name, backbone[name]) for name in _SHARED if name in backbone)
    stages = backbone.get('num_stages', 4)
    twin.setdefault('out_indices', tuple(range(stages)))
    for name in ('strides', 'dilations'):
        if name in twin:
            twin[name] = twin[name][:stages]
    model.backbone = twin
    return model


_SHARED = (
    *('depth', 'in_channels', 'strides', 'dilations', 'out_indices', 'norm_cfg'),
    *('style', 'deep_stem', 'avg_down'),
)
# On the outputs in eval mode.
_WITHOUT_EFFECT = (
    *('type', 'block', 'block_cfg', 'stem_block', 'stem_block_cfg', 'deploy'),
    *('init_cfg', 'frozen_stages'),
    *('norm_eval', 'with_cp', 'zero_init_residual', 'drop_path_rate'),
)


def _resnet(backbone: Mapping) -> tuple[dict, tuple[str, ...]]:
    """Type and widths in mmpretrain, and the names of the arguments they are from."""
    mult, base = backbone.get('width_mult', 1), backbone.get('base_channels', 64)
    stem = int((backbone.get('stem_channels') or base) * mult)
    base = int(base * mult)
    groups = backbone.get('groups', 1)
    width = base * backbone.get('width_per_group', 64) // 64
    twin = dict(
        type='mmpretrain.ResNet',
        num_stages=backbone.get('num_stages', 4),
        stem_channels=stem,
        base_channels=base,
    )
    if groups > 1:
        twin.update(type='mmpretrain.ResNeXt', groups=groups, width_per_group=width)
    elif width != base:  # Wide networks: the same outputs of a broader bottleneck.
        twin.update(base_channels=width, expansion=4 * base // width)
    names = ('num_stages', 'stem_channels', 'base_channels', 'width_mult')
    names += ('groups', 'width_per_group')
    if (backbone.get('act_cfg') or {}).get('type', 'ReLU') == 'ReLU':
        names += ('act_cfg',)
    return twin, names


def _repvgg(backbone: Mapping) -> tuple[dict, tuple[str, ...]]:
    arch = backbone['arch']
    arch = OREPARepVGG.ARCHITECTURES[arch] if isinstance(arch, str) else arch
    base, groups = backbone.get('base_channels', 64), arch.get('groups', 1)
    stages = backbone.get('num_stages', 4)
    every_second = range(2, sum(arch['num_blocks'][:stages]) + 1, 2)
    twin = dict(
        type='mmpretrain.RepVGG',
        arch=dict(
            num_blocks=arch['num_blocks'][:stages],
            width_factor=arch['widths'][:stages],
            stem_channels=base,
            group_layer_map=dict.fromkeys(every_second, groups),
            se_cfg=dict(ratio=16, divisor=1) if arch.get('use_se') else None,
        ),
        base_channels=base,
    )
    if backbone.get('act_cfg'):
        twin['act_cfg'] = backbone['act_cfg']
    return twin, ('num_stages', 'arch', 'base_channels', 'act_cfg')
