"""The published networks, by name and by the shapes of their weights."""

import re
from collections.abc import Mapping

from torch import Tensor

from ..backbones import OREPARepVGG, OREPAResNet
from ..backbones.orepa_resnet import BasicBlock, Bottleneck
from ..utils.errors import CheckpointError

ARCHITECTURES: dict[str, dict] = {
    'ResNet-18': dict(type='OREPAResNet', depth=18),
    'ResNet-34': dict(type='OREPAResNet', depth=34),
    'ResNet-50': dict(type='OREPAResNet', depth=50),
    'ResNet-101': dict(type='OREPAResNet', depth=101),
    'ResNet-152': dict(type='OREPAResNet', depth=152),
    'ResNet-18-1.5x': dict(type='OREPAResNet', depth=18, width_mult=1.5),
    'ResNet-18-2x': dict(type='OREPAResNet', depth=18, width_mult=2.0),
    'ResNeXt-50': dict(type='OREPAResNet', depth=50, groups=32, width_per_group=4),
    **{
        f'RepVGG-{arch}': dict(type='OREPARepVGG', arch=arch)
        for arch in (
            *('A0', 'A1', 'A2', 'B0', 'B1', 'B1g2', 'B1g4', 'B2', 'B2g2', 'B2g4'),
            *('B3', 'B3g2', 'B3g4', 'D2se'),
        )
    },
}
"""Backbone config by the published name of the network, without its block type."""


def backbone_of(arch: str, block: str) -> dict:
    """The config of a published network.

    Args:
        arch (str): A key of :data:`ARCHITECTURES`; case does not matter.
        block (str): The block type.

    Returns:
        dict: For MMEngine's ``MODELS``.

    Raises:
        ValueError: If there is no such network.
    """
    known = {name.lower(): backbone for name, backbone in ARCHITECTURES.items()}
    if arch.lower() not in known:
        raise ValueError(
            f'unknown architecture {arch!r}; choose one of {", ".join(ARCHITECTURES)}'
        )
    return dict(known[arch.lower()], block=block)


def identify(state_dict: Mapping[str, Tensor]) -> dict:
    """Finds the network that a published state dict belongs to.

    Args:
        state_dict (Mapping[str, Tensor]): Published keys, without ``module.``, in
            training or deployed form.

    Returns:
        dict: The backbone config. The deployed forms of a RepVGG and an OREPA-RepVGG
        are the same network, and called ``'orepa'``.

    Raises:
        CheckpointError: If it is none of the published kinds.
    """
    depths = _stage_depths(state_dict)
    if len(depths) != 4:
        raise CheckpointError(
            'this is no published OREPA checkpoint: it has no keys stage1.* to '
            f'stage4.*, but for example {", ".join(list(state_dict)[:3])}; for a plain '
            'network, use `python -m mmorepa convert_plain`'
        )
    is_repvgg = any('.rbr_' in key for key in state_dict)
    backbone = (_repvgg if is_repvgg else _resnet)(state_dict, depths)
    return dict(ARCHITECTURES.get(name_of(backbone), backbone), block=backbone['block'])


def name_of(backbone: Mapping) -> str:
    """The published name of a backbone config, or 'custom'."""
    names = {_full(arch): name for name, arch in ARCHITECTURES.items()}
    return names.get(_full(backbone), 'custom')


def _stage_depths(state_dict: Mapping[str, Tensor]) -> tuple[int, ...]:
    blocks: dict[str, set[str]] = {}
    for key in state_dict:
        match = re.match(r'(stage[1-4])\.(\d+)\.', key)
        if match:
            blocks.setdefault(match[1], set()).add(match[2])
    return tuple(len(blocks[stage]) for stage in sorted(blocks))


def _resnet(state_dict: Mapping[str, Tensor], depths: tuple[int, ...]) -> dict:
    is_bottleneck = any('.conv3.' in key for key in state_dict)
    blocks = Bottleneck if is_bottleneck else BasicBlock, depths
    known = {value: depth for depth, value in OREPAResNet.ARCHITECTURES.items()}
    if blocks not in known:
        raise CheckpointError(
            f'no ResNet has stages of {depths} '
            f'{"bottlenecks" if is_bottleneck else "basic blocks"}'
        )
    base_channels = _main_kernel(state_dict, 'stage0.conv1').shape[0]
    backbone = dict(
        type='OREPAResNet', depth=known[blocks], base_channels=base_channels
    )
    if is_bottleneck:
        outputs, inputs = _main_kernel(state_dict, 'stage1.0.conv2').shape[:2]
        groups = outputs // inputs
        backbone.update(
            groups=groups, width_per_group=outputs * 64 // (base_channels * groups)
        )
    block = 'plain'
    if any('dbb_' in key for key in state_dict):
        block = 'dbb'
    if any('orepa' in key for key in state_dict):
        block = 'orepa'
    return dict(backbone, block=block)


def _repvgg(state_dict: Mapping[str, Tensor], depths: tuple[int, ...]) -> dict:
    widths = [
        _main_kernel(state_dict, f'stage{i}.0').shape[0] / (64 * 2 ** (i - 1))
        for i in range(1, 5)
    ]
    arch = dict(num_blocks=depths, widths=tuple(widths))
    if depths[0] > 1:  # The second block of the network is the first grouped one.
        outputs, inputs = _main_kernel(state_dict, 'stage1.1').shape[:2]
        arch['groups'] = outputs // inputs
    if any('.se.' in key for key in state_dict):
        arch['use_se'] = True
    is_plain = any('rbr_dense.conv.' in key for key in state_dict)
    return dict(type='OREPARepVGG', arch=arch, block='repvgg' if is_plain else 'orepa')


def _main_kernel(state_dict: Mapping[str, Tensor], prefix: str) -> Tensor:
    """A kernel of shape (O, I/g, k, k) of the conv under ``prefix``."""
    # The factors of a deep linear stem: the first maps the image to O channels.
    tail = r'(weight0\.weight_orepa_origin|(rbr_dense\.)?weight_(orepa|rbr)_origin|'
    tail += r'(\w+_reparam|conv|(rbr_dense|dbb_origin)\.conv)\.weight)'
    for key, value in state_dict.items():
        if re.fullmatch(rf'{re.escape(prefix)}\.{tail}', key):
            return value
    raise CheckpointError(f'the checkpoint has no kernel under {prefix!r}')


def _full(backbone: Mapping) -> tuple:
    """A backbone config with its defaults, in a form that can be compared."""
    if backbone['type'] == 'OREPAResNet':
        width = backbone.get('base_channels', 64) * backbone.get('width_mult', 1.0)
        groups = backbone.get('groups', 1)
        return backbone['depth'], width, groups, backbone.get('width_per_group', 64)
    arch = backbone['arch']
    arch = OREPARepVGG.ARCHITECTURES[arch] if isinstance(arch, str) else arch
    return (
        tuple(arch['num_blocks']),
        tuple(map(float, arch['widths'])),
        arch.get('groups', 1),
        arch.get('use_se', False),
    )
