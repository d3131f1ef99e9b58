"""Checks of what a backbone is about to load."""

import os
import re

from mmengine.logging import print_log
from torch import Tensor, nn

from ..layers import ConvAct2d, ReparamConv2d
from ..utils.errors import COMPILED_KEYS, CheckpointError, describe_misfit


def check_is_known(
    backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """A load hook: raises if a state dict has entries, and none for a conv.

    MMEngine only warns, and the training would go on from random weights.

    Args:
        backbone (nn.Module): The network.
        state_dict (dict[str, Tensor]): Of the whole model.
        prefix (str): What the keys of the backbone start with.
        *args (object): The others of PyTorch's load hooks.

    Raises:
        CheckpointError: The first keys are named. Or a conv that is a plain one for
            good has the entries of branches.
    """
    if any('_orig_mod.' in key for key in state_dict):
        raise CheckpointError(f'the state dict does not fit: {COMPILED_KEYS}')
    names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
    if names and not _has_conv(backbone, names):
        raise CheckpointError(_unknown(backbone, names))
    # Here and not in the convs, of which each knows of itself alone.
    convs = {
        key[: m.start()] for key in names for m in re.finditer(r'\.branches\.', key)
    }
    trained = {name: m for name, m in backbone.named_modules() if name in convs}
    for name, module in trained.items():
        if isinstance(module, (nn.Conv2d, ConvAct2d)) and not isinstance(
            module, ReparamConv2d
        ):
            raise CheckpointError(
                f'the checkpoint holds the training form, and {name} became a plain '
                'conv by mmorepa.switch_to_deploy, which cannot fold it: load before '
                'that, or into a model that is built with deploy=True'
            )
    if any(isinstance(m, ReparamConv2d) and m.deployed for m in trained.values()):
        print_log(
            'The checkpoint holds the training form and the model is deployed: '
            'folding the branches while loading.',
            logger='current',
        )


def check_fits(
    backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """A load hook: raises unless a state dict has every entry of the backbone.

    Args:
        backbone (nn.Module): A :class:`StagedBackbone`.
        state_dict (dict[str, Tensor]): Of the whole model.
        prefix (str): What the keys of the backbone start with.
        *args (object): The others of PyTorch's load hooks.

    Raises:
        CheckpointError: If entries are missing, left over or of another shape.
    """
    names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
    if not names:
        advice = (
            f". It has nothing under '{prefix}': weights of a backbone alone "
            "go into its init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
        raise CheckpointError(_unknown(backbone, [*state_dict]) + advice)
    parts = tuple(f'{prefix}{name}.' for name in ('stem', *backbone.stage_names))
    expected = state_shapes(backbone)
    entries = {
        key.removeprefix(prefix): tuple(value.shape)
        for key, value in state_dict.items()
        if key.startswith(parts) and not key.endswith('num_batches_tracked')
    }
    for name, module in backbone.named_modules():
        if isinstance(module, ReparamConv2d) and _changes_form(
            module, name, expected, entries
        ):
            # The conv takes this form, or says why not.
            for shapes in (expected, entries):
                for key in [k for k in shapes if k.startswith(f'{name}.')]:
                    del shapes[key]
    problems = describe_misfit(expected, entries, 3)
    if problems:
        raise CheckpointError(
            f'the checkpoint does not fit this {type(backbone).__name__}: {problems}'
        )


def _changes_form(
    conv: ReparamConv2d, name: str, expected: dict, entries: dict
) -> bool:
    """True if the entries of a conv are those of another form than its own."""
    kinds = {
        key[len(name) + 1 :].split('.')[0]
        for key in entries
        if key.startswith(f'{name}.')
    }
    if conv.deployed:
        return bool(kinds & {'branches', 'norm'})
    kernel = f'{name}.branches.weight'  # The training form of a plain conv.
    is_plain = kernel in entries and kernel not in expected
    return bool(kinds) and ('branches' not in kinds or is_plain)


def _has_conv(backbone: nn.Module, names: list[str]) -> bool:
    convs = tuple(
        f'{name}.'
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Conv2d, ConvAct2d))
    )
    return any(name.startswith(convs) for name in names)


def _unknown(backbone: nn.Module, names: list[str]) -> str:
    return (
        f'nothing in the checkpoint belongs to a {type(backbone).__name__}: it has '
        f'{", ".join(names[:3])}, …'
    )


def state_shapes(module: nn.Module, prefix: str = '') -> dict[str, tuple[int, ...]]:
    """The shapes of what a module saves, without the number of batches."""
    return {
        prefix + name: tuple(value.shape)
        for name, value in module.state_dict().items()
        if not name.endswith('num_batches_tracked')
    }


def check_is_there(checkpoint: str) -> None:
    """Raises if the file of an ``init_cfg`` is missing.

    Args:
        checkpoint (str): A path. An address, such as https://… and torchvision://…,
            is left to MMEngine.

    Raises:
        CheckpointError: With what to do instead.
    """
    if '://' in checkpoint or os.path.isfile(checkpoint):
        return
    raise CheckpointError(
        f'no pretrained weights at {checkpoint!r} (init_cfg of the backbone). Start '
        "from a plain network, as the configs with '-from-plain' in their names do; "
        'train these weights with the ImageNet config of that name; or convert a '
        'published checkpoint (python -m mmorepa convert). Set the path by '
        '--cfg-options model.backbone.init_cfg.checkpoint=...; to start from random '
        'weights: model.backbone.init_cfg=None model.backbone.norm_eval=False'
    )


def check_style(backbone: nn.Module, checkpoint: str) -> None:
    """Refuses a checkpoint whose name says that its network has another style.

    Args:
        backbone (nn.Module): With a ``style``, or of the usual one.
        checkpoint (str): The path or address of what it starts from.

    Raises:
        CheckpointError: If the file's name has caffe or msra in it and the style is
            another one, or it is torchvision's and the style is caffe's.
    """
    name = checkpoint.rpartition('/')[-1]
    style = getattr(backbone, 'style', 'pytorch')
    caffe = re.search('caffe|msra', name, re.IGNORECASE)
    if caffe and style != 'caffe':
        raise CheckpointError(
            f'{name!r} is of a caffe-style network by its name ({caffe[0]}), with the '
            "stride on the first 1x1 conv: set style='caffe', and the "
            'data_preprocessor that goes with it; or take weights of this style, such '
            'as torchvision://resnet50 (rename the file if its name is wrong)'
        )
    if checkpoint.startswith('torchvision://') and style == 'caffe':
        raise CheckpointError(
            f"{checkpoint!r} has the stride on the 3x3 conv: set style='pytorch', or "
            'take weights of a caffe-style network, such as '
            'open-mmlab://detectron2/resnet50_caffe'
        )
