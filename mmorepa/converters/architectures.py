"""Finds the network of a published checkpoint by the keys and shapes."""

import re
from collections.abc import Mapping

from torch import Tensor

from ..backbones import OREPARepVGG, OREPAResNet
from ..backbones.orepa_resnet import BasicBlock, Bottleneck
from ..utils.errors import CheckpointError


def identify(state_dict: Mapping[str, Tensor]) -> dict:
    """Finds the network that a published state dict belongs to.

    Args:
        state_dict (Mapping[str, Tensor]): Published keys, without ``module.``, in
            training or deployed form.

    Returns:
        dict: The backbone config. RepVGG and OREPA-RepVGG have the same deployed form,
        for which ``block`` is ``'orepa'``.

    Raises:
        CheckpointError: If the network is none of the published ones.
    """
    depths = _stage_depths(state_dict)
    if len(depths) != 4:
        raise CheckpointError(
            'this is no published OREPA checkpoint: it has no keys stage1.* to '
            f'stage4.*, but for example {", ".join(list(state_dict)[:3])}; for a plain '
            'network, use `python -m mmorepa convert_plain`'
        )
    is_repvgg = any('.rbr_' in key for key in state_dict)
    return (_repvgg if is_repvgg else _resnet)(state_dict, depths)


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
    backbone = dict(type='OREPAResNet', depth=known[blocks], block='plain')
    for block in ('dbb', 'orepa'):
        if any(block in key for key in state_dict):
            backbone['block'] = block
    base_channels = _main_kernel(state_dict, 'stage0.conv1').shape[0]
    if base_channels != 64:
        backbone['base_channels'] = base_channels
    if is_bottleneck:
        outputs, inputs = _main_kernel(state_dict, 'stage1.0.conv2').shape[:2]
        groups = outputs // inputs
        width = outputs * 64 // (base_channels * groups)
        if (groups, width) != (1, 64):
            backbone.update(groups=groups, width_per_group=width)
    return backbone


def _repvgg(state_dict: Mapping[str, Tensor], depths: tuple[int, ...]) -> dict:
    widths = [
        _main_kernel(state_dict, f'stage{i}.0').shape[0] / (64 * 2 ** (i - 1))
        for i in range(1, 5)
    ]
    arch = dict(num_blocks=depths, widths=tuple(widths))
    if depths[0] > 1:  # The second block of the network is the first grouped one.
        outputs, inputs = _main_kernel(state_dict, 'stage1.1').shape[:2]
        if outputs != inputs:
            arch['groups'] = outputs // inputs
    if any('.se.' in key for key in state_dict):
        arch['use_se'] = True
    names = [name for name, known in OREPARepVGG.ARCHITECTURES.items() if known == arch]
    is_plain = any('rbr_dense.conv.' in key for key in state_dict)
    return dict(
        type='OREPARepVGG',
        arch=names[0] if names else arch,
        block='repvgg' if is_plain else 'orepa',
    )


def _main_kernel(state_dict: Mapping[str, Tensor], prefix: str) -> Tensor:
    """A kernel of shape (O, I/g, k, k) of the conv under ``prefix``."""
    # In a deep linear stem, take the first factor, which maps the image to O channels.
    tail = r'(weight0\.weight_orepa_origin|(rbr_dense\.)?weight_(orepa|rbr)_origin|'
    tail += r'(\w+_reparam|conv|(rbr_dense|dbb_origin)\.conv)\.weight)'
    for key, value in state_dict.items():
        if re.fullmatch(rf'{re.escape(prefix)}\.{tail}', key):
            return value
    raise CheckpointError(f'the checkpoint has no kernel under {prefix!r}')
