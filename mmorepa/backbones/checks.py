"""Checks of what a backbone is about to load."""

import os
import re

import torch
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from torch import Tensor, nn

from ..layers import ConvAct2d, OREPAKernel, ReparamConv2d
from ..utils.errors import COMPILED_KEYS, CheckpointError, describe_misfit

Shapes = dict[str, tuple[int, ...]]


def check_is_known(
    backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """A load hook: raises CheckpointError if a state dict has no entry for any conv.

    MMEngine only warns, and the training would go on from random weights. It also
    raises for the branches of a conv that is a plain one for good.
    """
    if any('_orig_mod.' in key for key in state_dict):
        raise CheckpointError(f'the state dict does not fit: {COMPILED_KEYS}')
    names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
    convs = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Conv2d, ConvAct2d))
    }
    starts = tuple(f'{name}.' for name in convs)
    if names and not any(name.startswith(starts) for name in names):
        raise CheckpointError(_unknown(backbone, names))
    # Here and not in the convs, of which each knows of itself alone.
    with_branches = {n.partition('.branches.')[0] for n in names if '.branches.' in n}
    trained = {name: conv for name, conv in convs.items() if name in with_branches}
    for name, conv in trained.items():
        if not isinstance(conv, ReparamConv2d):
            raise CheckpointError(
                f'the checkpoint holds the training form, and {name} became a plain '
                'conv by mmorepa.switch_to_deploy, which cannot fold it: load before '
                'that, or into a model that is built with deploy=True'
            )
    if any(conv.deployed for conv in trained.values()):
        print_log(
            'The checkpoint holds the training form and the model is deployed: '
            'folding the branches while loading.',
            logger='current',
        )


def check_fits(
    backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """A load hook: raises CheckpointError unless all entries of the backbone are there.

    They may be of the training form, deployed, or of a plain network. Plugins of which
    there is nothing stay as they are.
    """
    if not any(key.startswith(prefix) for key in state_dict):
        raise CheckpointError(
            f"{_unknown(backbone, [*state_dict])}. It has nothing under '{prefix}': "
            "weights of a backbone alone go into its init_cfg=dict(type='Pretrained', "
            'checkpoint=...)'
        )
    # Not a classifier, for example, or stages that are not built.
    parts = tuple(f'{prefix}{name}.' for name in ('stem', *backbone.stage_names))
    entries = {
        key.removeprefix(prefix): tuple(value.shape)
        for key, value in state_dict.items()
        if key.startswith(parts) and not key.endswith('num_batches_tracked')
    }
    expected = _shapes(backbone)
    for name, module in backbone.named_modules():
        for plugin in getattr(module, 'plugin_names', ()):
            if not _under(f'{name}.{plugin}.', entries):
                _remove(f'{name}.{plugin}.', expected)
        if isinstance(module, OREPAKernel):
            # Earlier versions stored the parameters in another order.
            for role in module.branch_sum.roles:
                if f'{name}.{role}' in entries:
                    former = torch.empty(entries[f'{name}.{role}'], device='meta')
                    stored = module.branch_sum.from_former(role, former)
                    entries[f'{name}.{role}'] = tuple(stored.shape)
        if isinstance(module, ReparamConv2d):
            _expect_form(module, f'{name}.', expected, entries)
    # Where kernels differ, their names say it all.
    problems = describe_misfit(_kernels(expected), _kernels(entries), 3)
    problems = problems or describe_misfit(expected, entries, 3)
    if problems:
        raise CheckpointError(
            f'the checkpoint does not fit this {type(backbone).__name__}: {problems}'
        )


def _expect_form(
    conv: ReparamConv2d, start: str, expected: Shapes, entries: Shapes
) -> None:
    """Expects of a conv what the form has that the checkpoint is in."""
    if not _under(start, expected):  # A branch of a conv of which another is expected.
        return
    found = {key.removeprefix(start).split('.')[0] for key in _under(start, entries)}
    if conv.deployed:
        takes, is_plain = 'branches' in found, 'norm' in found
    else:
        kernel = f'{start}branches.weight'  # The training form of a plain conv.
        is_former = kernel in entries and kernel not in expected
        is_folded = 'bias' in found and not found & {'branches', 'norm'}
        takes, is_plain = is_former or is_folded, 'branches' not in found
    if takes:
        # The conv takes this form, or says why not.
        _remove(start, expected)
        _remove(start, entries)
    elif is_plain:
        _remove(start, expected)
        expected[f'{start}weight'] = tuple(conv.kernel_shape)
        if conv.norm_cfg is not None:
            norm = build_norm_layer(conv.norm_cfg, conv.out_channels)[1]
            expected.update({f'{start}norm.{k}': v for k, v in _shapes(norm).items()})


def _under(start: str, shapes: Shapes) -> list[str]:
    return [key for key in shapes if key.startswith(start)]


def _remove(start: str, shapes: Shapes) -> None:
    for key in _under(start, shapes):
        del shapes[key]


def _kernels(shapes: Shapes) -> Shapes:
    return {
        key.removesuffix('.weight'): shape
        for key, shape in shapes.items()
        if key.endswith('.weight') and len(shape) == 4
    }


def _shapes(module: nn.Module) -> Shapes:
    return {
        name: tuple(value.shape)
        for name, value in module.state_dict().items()
        if not name.endswith('num_batches_tracked')
    }


def _unknown(backbone: nn.Module, names: list[str]) -> str:
    return (
        f'nothing in the checkpoint belongs to a {type(backbone).__name__}: it has '
        f'{", ".join(names[:3])}, …'
    )


def check_is_there(checkpoint: str) -> None:
    """Raises CheckpointError if the file of an ``init_cfg`` is missing.

    Addresses, such as https://… and torchvision://…, are left to MMEngine.
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
    """Raises CheckpointError if a checkpoint has another style by its name.

    That is one with caffe or msra in its file's name for the usual style, and one of
    torchvision's for the style of caffe.
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
