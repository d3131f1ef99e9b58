"""Checkpoints of plain networks, under the names that our networks have for them.

They are those of torchvision, timm and OpenMMLab. A backbone calls
:func:`translate_plain` whenever it loads a state dict.
"""

import re
from collections.abc import Collection

from torch import Tensor

from ..backbones import OREPARepVGG, OREPAResNet, StagedBackbone

# Parts of their names, as patterns, and the same parts here.
_RESNET = (
    (r'^conv1\.weight$', 'stem.weight'),
    (r'^bn1\.', 'stem.norm.'),
    (r'^(layer\d\.\d+)\.bn(\d)\.', r'\1.conv\2.norm.'),
    # The three convs of a deep stem in mmpretrain,
    (r'^stem\.0\.conv\.', 'stem.conv1.'),
    (r'^stem\.0\.bn\.', 'stem.conv1.norm.'),
    (r'^stem\.1\.conv\.', 'stem.conv2.'),
    (r'^stem\.1\.bn\.', 'stem.conv2.norm.'),
    (r'^stem\.2\.conv\.', 'stem.conv3.'),
    (r'^stem\.2\.bn\.', 'stem.conv3.norm.'),
    # and in mmdet, mmseg and timm.
    (r'^(stem|conv1)\.0\.', 'stem.conv1.'),
    (r'^(stem|conv1)\.1\.', 'stem.conv1.norm.'),
    (r'^(stem|conv1)\.3\.', 'stem.conv2.'),
    (r'^(stem|conv1)\.4\.', 'stem.conv2.norm.'),
    (r'^(stem|conv1)\.6\.', 'stem.conv3.'),
    (r'^(stem|conv1)\.7\.', 'stem.conv3.norm.'),
)
# mmpretrain's, in training form and deployed.
_REPVGG = (
    (r'^stage_?(\d)\.', r'layer\1.'),
    (r'\.branch_3x3\.conv\.', '.conv.branches.origin.'),
    (r'\.branch_3x3\.(norm|bn)\.', '.conv.branches.origin.norm.'),
    (r'\.branch_1x1\.conv\.', '.conv.branches.pointwise.'),
    (r'\.branch_1x1\.(norm|bn)\.', '.conv.branches.pointwise.norm.'),
    (r'\.branch_norm\.', '.conv.branches.identity.norm.'),
    (r'\.branch_reparam\.', '.conv.'),
    (r'\.se_layer\.conv1\.conv\.', '.se.down.'),
    (r'\.se_layer\.conv2\.conv\.', '.se.up.'),
)


def plain_names(backbone: StagedBackbone, names: Collection[str]) -> dict[str, str]:
    """Our names of the entries of a plain network's checkpoint, by their names there.

    Those with the same name are left out.
    """
    if isinstance(backbone, OREPAResNet):
        ours = {name: _resnet_name(backbone, name, names) for name in names}
    elif isinstance(backbone, OREPARepVGG):
        ours = {name: _replaced(name, _REPVGG) for name in names}
    else:
        ours = {}
    return {theirs: name for theirs, name in ours.items() if name != theirs}


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _resnet_name(backbone: OREPAResNet, name: str, names: Collection[str]) -> str:
    # timm's, with three convs in the place of one.
    if name.startswith('bn1.') and 'conv1.0.weight' in names:
        return f'stem.conv3.norm.{name[4:]}'
    match = re.fullmatch(r'(layer\d\.\d+\.downsample)\.([012])\.(\w+)', name)
    if not match:
        return _replaced(name, _RESNET)
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

    The load then has to bring every weight of the backbone.
    """
    start = 'backbone.'
    if not prefix and any(key.startswith(start) for key in state_dict):
        for key in list(state_dict):  # A whole model's.
            value = state_dict.pop(key)
            if key.startswith(start):
                state_dict[key.removeprefix(start)] = value
    names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
    renamed = plain_names(backbone, names)
    for name, ours in renamed.items():
        state_dict[prefix + ours] = state_dict.pop(prefix + name)
    backbone.must_fit = bool(renamed)


StagedBackbone.load_hooks.append(translate_plain)
