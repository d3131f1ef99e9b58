"""Translates the entry names of plain networks to the names in our backbones.

The plain networks are from torchvision, timm and OpenMMLab.
"""

import re
from collections.abc import Collection, Sequence

from torch import nn

# Patterns for parts of a plain network's names, and the same parts in our names.
_RESNET = (
    (r'^conv1\.weight$', 'stem.weight'),
    (r'^bn1\.', 'stem.norm.'),
    (r'^(layer\d\.\d+)\.bn(\d)\.', r'\1.conv\2.norm.'),
    # The three convs of a deep stem in mmpretrain.
    (r'^stem\.0\.conv\.', 'stem.conv1.'),
    (r'^stem\.0\.bn\.', 'stem.conv1.norm.'),
    (r'^stem\.1\.conv\.', 'stem.conv2.'),
    (r'^stem\.1\.bn\.', 'stem.conv2.norm.'),
    (r'^stem\.2\.conv\.', 'stem.conv3.'),
    (r'^stem\.2\.bn\.', 'stem.conv3.norm.'),
    # The same convs in mmdet, mmseg and timm.
    (r'^(stem|conv1)\.0\.', 'stem.conv1.'),
    (r'^(stem|conv1)\.1\.', 'stem.conv1.norm.'),
    (r'^(stem|conv1)\.3\.', 'stem.conv2.'),
    (r'^(stem|conv1)\.4\.', 'stem.conv2.norm.'),
    (r'^(stem|conv1)\.6\.', 'stem.conv3.'),
    (r'^(stem|conv1)\.7\.', 'stem.conv3.norm.'),
)
# The same for mmpretrain's RepVGG, in training form and deployed.
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


def repvgg_name(name: str) -> str:
    """The name in an ``OREPARepVGG`` for an entry of a plain network."""
    return renamed(name, _REPVGG)


def resnet_name(network: nn.Module, name: str, names: Collection[str]) -> str:
    """The name in an ``OREPAResNet``. ``names`` are all names in the checkpoint."""
    # With a deep stem, timm calls its last norm bn1.
    if name.startswith('bn1.') and 'conv1.0.weight' in names:
        return f'stem.conv3.norm.{name[4:]}'
    match = re.fullmatch(r'(layer\d\.\d+\.downsample)\.([012])\.(\w+)', name)
    if not match:
        return renamed(name, _RESNET)
    shortcut, number, entry = match.groups()
    # If a pooling (or timm's nn.Identity) comes first, the conv is the second module.
    has_first = f'{shortcut}.2.weight' in names
    is_kernel = int(number) == has_first
    module = dict(network.named_modules()).get(shortcut)
    if has_first and getattr(module, 'stride', None) != (1, 1):
        shortcut += '.conv'
    return f'{shortcut}.{entry}' if is_kernel else f'{shortcut}.norm.{entry}'


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    """Applies all (pattern, replacement) pairs of a table to a name, in their order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
