"""Checks of the checkpoints that a backbone loads."""

import os
import re
from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import ConvAct2d, ReparamConv2d
from ..utils.errors import COMPILED_KEYS, CheckpointError, describe_misfit


def check_is_known(backbone: nn.Module, names: Sequence[str]) -> None:
    """Raises CheckpointError if no entry of a checkpoint belongs to a conv.

    MMEngine would only warn, and then train from random weights. This function also
    raises if there are branches for a conv that ``switch_to_deploy`` made plain.
    """
    if any('_orig_mod.' in name for name in names):
        raise CheckpointError(f'the state dict does not fit: {COMPILED_KEYS}')
    convs = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Conv2d, ConvAct2d))
    }
    starts = tuple(f'{name}.' for name in convs)
    if names and not any(name.startswith(starts) for name in names):
        raise CheckpointError(
            f'nothing in the checkpoint belongs to a {type(backbone).__name__}: it has '
            f'{", ".join(names[:3])}, …'
        )
    # A plain nn.Conv2d cannot check this itself: it knows nothing of branches.
    with_branches = {n.partition('.branches.')[0] for n in names if '.branches.' in n}
    for name, conv in convs.items():
        if name in with_branches and not isinstance(conv, ReparamConv2d):
            raise CheckpointError(
                f'the checkpoint holds the training form, and {name} became a plain '
                'conv by mmorepa.switch_to_deploy, which cannot fold it: load before '
                'that, or into a model that is built with deploy=True'
            )


def require_fit(
    backbone: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object
) -> None:
    """A load hook: requires this load to set every weight, see :func:`check_fits`."""
    if not any(key.startswith(prefix) for key in state_dict):
        raise CheckpointError(
            f'nothing in the checkpoint belongs to a {type(backbone).__name__}: it has '
            f"nothing under '{prefix}'. Weights of a backbone alone go into its "
            "init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    backbone.must_fit = True


def check_fits(backbone: nn.Module, incompatible_keys: object) -> None:
    """Raises CheckpointError unless the load that ends here has set every weight.

    The checkpoint may be of the training form, the deployed form or a plain network.
    It may lack all entries of a plugin: that plugin then keeps its weights.
    """
    prefix = backbone.load_prefix
    # Ignore entries of other parts, such as a classifier or stages that are not built.
    parts = tuple(f'{prefix}{name}.' for name in ('stem', *backbone.stage_names))
    missing, left_over = (
        {
            key.removeprefix(prefix)
            for key in keys
            if key.startswith(parts) and not key.endswith('num_batches_tracked')
        }
        for keys in (incompatible_keys.missing_keys, incompatible_keys.unexpected_keys)
    )
    for name, block in backbone.named_modules():
        for plugin in getattr(block, 'plugin_names', ()):
            start = f'{name}.{plugin}.'
            parameters = block.get_submodule(plugin).named_parameters()
            if {start + key for key, _ in parameters} <= missing:
                missing = {key for key in missing if not key.startswith(start)}
    # Select the errors of this backbone: its keys follow a space or a quotation mark.
    starts = (f' {prefix}', f'"{prefix}')
    errors = [e for e in backbone.load_errors if any(start in e for start in starts)]
    problems = [
        describe_errors(errors) if errors else '',
        describe_misfit(dict.fromkeys(missing, ()), dict.fromkeys(left_over, ()), 3),
    ]
    if any(problems):
        raise CheckpointError(
            f'the checkpoint does not fit this {type(backbone).__name__}: '
            f'{"; ".join(filter(None, problems))}'
        )


def describe_errors(lines: Sequence[str]) -> str:
    """The first error that PyTorch reports for a load, and the number of the others."""
    first, *more = lines
    return first.strip() + (f', and {len(more)} more' if more else '')


def check_exists(checkpoint: str) -> None:
    """Raises CheckpointError if the file of an ``init_cfg`` is missing.

    MMEngine checks addresses, such as https://… and torchvision://….
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
    """Raises CheckpointError if the name of a checkpoint tells another style.

    File names with caffe or msra do not fit the style ``'pytorch'``, and addresses of
    torchvision do not fit the style ``'caffe'``.
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
