"""Checkpoints of plain networks, under the names that our networks have for them.

They are those of torchvision, timm and OpenMMLab. A backbone calls
:func:`translate_plain` whenever it loads a state dict.
"""

import re
from collections.abc import Collection
from typing import Optional

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..backbones import OREPARepVGG, OREPAResNet, StagedBackbone
from ..backbones.checks import state_shapes
from ..backbones.orepa_repvgg import SqueezeExcitation
from ..layers import ReparamConv2d, RepVGGConv2d
from ..utils.errors import CheckpointError, describe_misfit

Shapes = dict[str, tuple[int, ...]]

# Patterns of their names, and the names here.
_RESNET = (
    (r'conv1\.weight', r'stem.weight'),
    (r'bn1\.(\w+)', r'stem.norm.\1'),
    *(
        (
            pattern.format(conv=3 * i, norm=3 * i + 1, number=i),
            f'stem.conv{i + 1}.{ours}',
        )
        for i in range(3)
        for pattern, ours in (
            (r'(?:stem|conv1)\.{conv}\.weight', 'weight'),
            (r'(?:stem|conv1)\.{norm}\.(\w+)', r'norm.\1'),
            (r'stem\.{number}\.conv\.weight', 'weight'),
            (r'stem\.{number}\.bn\.(\w+)', r'norm.\1'),
        )
    ),
    (r'(layer\d\.\d+)\.bn(\d)\.(\w+)', r'\1.conv\2.norm.\3'),
)
_NORM = r'\.(?:norm|bn)\.(\w+)'
# mmpretrain's, in training form and deployed.
_REPVGG = tuple(
    (rf'{there}\.{theirs}', f'{here}.{ours}'.format(last))
    for there, here, last in (
        ('stem', 'stem', r'\1'),
        (r'stage_?(\d)\.(\d+)', r'layer\1.\2', r'\3'),
    )
    for theirs, ours in (
        (r'branch_3x3\.conv\.weight', r'conv.branches.origin.weight'),
        (rf'branch_3x3{_NORM}', r'conv.branches.origin.norm.{0}'),
        (r'branch_1x1\.conv\.weight', r'conv.branches.pointwise.weight'),
        (rf'branch_1x1{_NORM}', r'conv.branches.pointwise.norm.{0}'),
        (r'branch_norm\.(\w+)', r'conv.branches.identity.norm.{0}'),
        (r'branch_reparam\.(\w+)', r'conv.{0}'),
        (r'se_layer\.conv1\.conv\.(\w+)', r'se.down.{0}'),
        (r'se_layer\.conv2\.conv\.(\w+)', r'se.up.{0}'),
    )
)


def plain_names(backbone: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Our names of the entries of a plain network's checkpoint.

    Args:
        backbone (nn.Module): Ours.
        names (Collection[str]): The names of all entries there.

    Returns:
        dict[str, str]: By theirs. Entries with the same name, or none, are left out.
    """
    if isinstance(backbone, OREPAResNet):
        ours = {name: _resnet_name(backbone, name, names) for name in names}
    elif isinstance(backbone, OREPARepVGG):
        ours = {name: _by_pattern(_REPVGG, name) for name in names}
    else:
        ours = {}
    return {theirs: name for theirs, name in ours.items() if name is not None}


def _by_pattern(table: tuple[tuple[str, str], ...], name: str) -> Optional[str]:
    for pattern, ours in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours)
    return None


def _resnet_name(
    backbone: OREPAResNet, name: str, names: Collection[str]
) -> Optional[str]:
    # timm's, with three convs in the place of one.
    if name.startswith('bn1.') and 'conv1.0.weight' in names:
        return f'stem.conv3.norm.{name[4:]}'
    match = re.fullmatch(r'(layer\d\.\d+\.downsample)\.([012])\.(\w+)', name)
    if not match:
        return _by_pattern(_RESNET, name)
    shortcut, number, entry = match.groups()
    # Behind a pooling, or timm's nn.Identity in its place, the conv is the second.
    has_first = f'{shortcut}.2.weight' in names
    is_kernel = int(number) == has_first
    module = dict(backbone.named_modules()).get(shortcut)
    if has_first and getattr(module, 'stride', None) != (1, 1):
        shortcut += '.conv'
    return f'{shortcut}.{entry}' if is_kernel else f'{shortcut}.norm.{entry}'


def translate_plain(
    backbone: StagedBackbone, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """A load hook: gives the entries of a plain network the names that they have here.

    Args:
        backbone (StagedBackbone): What is about to load them.
        state_dict (dict[str, Tensor]): Of the whole model; changed in place.
        prefix (str): What the keys of the backbone start with.
        *args (object): The others of PyTorch's load hooks.

    Raises:
        CheckpointError: If the network is another one; nothing is loaded then.
    """
    start = 'backbone.'
    if not prefix and any(key.startswith(start) for key in state_dict):
        for key in list(state_dict):  # A whole model's.
            value = state_dict.pop(key)
            if key.startswith(start):
                state_dict[key.removeprefix(start)] = value
    names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
    renamed = plain_names(backbone, names)
    if not renamed:
        return
    if isinstance(backbone, OREPARepVGG):
        conv = backbone.stem.conv
        if not isinstance(conv, RepVGGConv2d) and any(
            name.startswith('stem.branch_') for name in names
        ):
            raise CheckpointError(
                'the checkpoint is that of a RepVGG, whose branches are those of '
                f"block='repvgg' and 'orepa', found {type(conv).__name__}"
            )
    for name, ours in renamed.items():
        state_dict[prefix + ours] = state_dict.pop(prefix + name)
    shapes = {
        key.removeprefix(prefix): tuple(value.shape)
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    _check_is_same(backbone, shapes)


StagedBackbone.load_hooks.append(translate_plain)


def _check_is_same(backbone: StagedBackbone, shapes: Shapes) -> None:
    """Raises unless the plain network of these entries is exactly this one."""
    is_folded = not any(name.endswith('.running_var') for name in shapes)
    expected = _expected_shapes(backbone, is_folded)
    ours, parts = backbone.state_dict(), dict(backbone.named_children())
    for name, shape in list(shapes.items()):
        part = name.split('.')[0]
        is_other = part not in parts and len(shape) < 4  # Such as a classifier.
        is_unbuilt = re.fullmatch(r'layer\d', part) and part not in parts
        is_extra = name in ours and name not in expected
        is_count = name.endswith('.num_batches_tracked')
        if is_other or is_unbuilt or is_extra or is_count:
            del shapes[name]
    # Where kernels differ, their names say it all.
    is_repvgg = isinstance(backbone, OREPARepVGG)
    problems = describe_misfit(
        _kernels(expected, is_repvgg), _kernels(shapes, is_repvgg), 3
    )
    what = 'Convs' if problems else 'Entries'
    problems = problems or describe_misfit(expected, shapes, 3)
    if problems:
        raise CheckpointError(
            'the checkpoint is that of a plain network, and another one than this '
            f'{type(backbone).__name__}. {what} {problems}'
        )


def _kernels(shapes: Shapes, is_repvgg: bool) -> Shapes:
    pattern = (
        r'(.+\.conv)(?:\.branches\.origin)?\.weight' if is_repvgg else r'(.+)\.weight'
    )
    matches = ((re.fullmatch(pattern, name), shape) for name, shape in shapes.items())
    return {match[1]: shape for match, shape in matches if match and len(shape) > 3}


def _expected_shapes(backbone: StagedBackbone, is_folded: bool) -> Shapes:
    """The entries of the plain network; with ``is_folded``, without BatchNorms."""
    plugins = {
        part
        for stage in backbone.stages
        for block in stage
        for name in getattr(block, 'plugin_names', ())
        for part in getattr(block, name).modules()
    }
    shapes: Shapes = {}
    for name, module in backbone.named_modules():
        if '.branches' in name or module in plugins:
            continue
        if isinstance(module, SqueezeExcitation):
            shapes |= state_shapes(module, f'{name}.')
        elif not isinstance(module, ReparamConv2d):
            continue
        elif isinstance(backbone, OREPARepVGG) and not is_folded:
            shapes |= _repvgg_shapes(module, f'{name}.')
        else:
            shapes |= _conv_shapes(module, is_folded, f'{name}.')
    return shapes


def _repvgg_shapes(conv: ReparamConv2d, prefix: str) -> Shapes:
    if not isinstance(conv, RepVGGConv2d):
        return _conv_shapes(conv, False, prefix)
    with torch.device('meta'):  # A deployed conv has no branches any more.
        branches = conv.build_branches()
    shapes: Shapes = {}
    for name, branch in branches.items():
        start = f'{prefix}branches.{name}.'
        if isinstance(branch, ReparamConv2d):
            shapes |= _conv_shapes(branch, False, start)
        shapes |= state_shapes(branch.norm, f'{start}norm.')
    return shapes


def _conv_shapes(conv: ReparamConv2d, is_folded: bool, prefix: str) -> Shapes:
    outputs = conv.out_channels
    kernel = (outputs, conv.in_channels // conv.groups, *conv.kernel_size)
    if is_folded:
        return {f'{prefix}weight': kernel, f'{prefix}bias': (outputs,)}
    norm = build_norm_layer(conv.norm_cfg, outputs)[1]
    return {f'{prefix}weight': kernel, **state_shapes(norm, f'{prefix}norm.')}
