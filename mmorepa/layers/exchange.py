"""Replaces plain convs in any model by training forms."""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Optional, Union

import mmcv.cnn
import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .blocks import build_conv, conv_type
from .conv import ReparamConv2d
from .plain import PlainConv2d
from .switch import OF_CONVS, has_hooks, outermost, parallel_wrapper

# The conv of mmcv differs only for empty batches in old versions of PyTorch.
_PLAIN_CONVS = (nn.Conv2d, mmcv.cnn.Conv2d)


def add_branches(
    model: nn.Module,
    block: str = 'orepa',
    include: Union[str, Sequence[str]] = '*',
    exclude: Union[str, Sequence[str]] = (),
    block_cfg: Optional[dict] = None,
) -> nn.Module:
    """Makes the convs of a model training forms. The model computes the same.

    Each conv starts from its plain kernel and stays the same object. Devices, dtypes,
    ``requires_grad`` and the mode do not change. :func:`switch_to_deploy` gives the
    plain model back, with a state dict that the original class loads.

    Some convs are not changed, and one line in the log names them. Some have no exact
    fold: even or non-square kernels, padding with other values than zeros, depthwise
    7×7 kernels. Some may compute something else: subclasses of
    :class:`torch.nn.Conv2d`, and convs with hooks, a parametrization, a shared
    parameter, or an added method, parameter, buffer or module. A changed conv keeps
    its other attributes.

    Args:
        model (nn.Module): Any model; it is changed in place.
        block (str): Block type, a name in :data:`mmorepa.layers.BLOCKS`. The convs of
            ``'dbb'``, ``'repvgg'`` and ``'orepa_repvgg'`` have BatchNorms. They compute
            the same in eval mode, and in training mode if another BatchNorm follows.
            Their deployed form has a bias. Defaults to ``'orepa'``.
        include (str | Sequence[str]): Patterns such as ``'backbone.*'`` of the names
            of convs to change. Defaults to ``'*'``.
        exclude (str | Sequence[str]): Patterns of convs to leave. Defaults to none.
        block_cfg (dict, optional): Arguments for convs of this block type. Defaults to
            None.

    Returns:
        nn.Module: ``model``.

    Raises:
        ValueError: If the block type is unknown, no conv was changed, or a pattern
            fits no module.
        RuntimeError: If the model is wrapped for data parallelism.

    Examples:
        >>> net = torchvision.models.resnet50(weights='DEFAULT')
        >>> mmorepa.add_branches(net, exclude='layer1.*')
    """
    conv_type(block, 3)  # Raises for an unknown block type.
    wrapper = parallel_wrapper(model)
    if wrapper is not None:
        raise RuntimeError(
            f'{type(wrapper).__name__} is around the model, and would not average the '
            'gradients of branches that come later: call mmorepa.add_branches(model) '
            'first, and wrap it then'
        )
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    names: dict[nn.Module, list[str]] = {}  # A shared module has several names.
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for pattern in (*include, *exclude):
        if not any(_matches(of_one, [pattern]) for of_one in names.values()):
            raise ValueError(
                f'{type(model).__name__} has no module with a name like {pattern!r}'
            )
    inside = {part for _, form in outermost(model) for part in form.modules()}
    users = Counter(p for module in names for p in module._parameters.values())
    exchanged: dict[nn.Module, nn.Module] = {}
    skipped: dict[str, str] = {}
    for conv, of_conv in names.items():
        if not isinstance(conv, _ConvNd) or conv in inside:
            continue
        try:
            if not _matches(of_conv, include) or _matches(of_conv, exclude):
                raise ValueError('left out by include or exclude')
            _check_is_plain(conv)
            if any(users[p] > 1 for p in conv.parameters()):
                raise ValueError('shares a parameter')
            exchanged[conv] = _training_form(conv, block, block_cfg)
            if block != 'plain' and not has_branches(exchanged[conv]):
                skipped[of_conv[0]] = f'a {block} network has no branches there'
        except ValueError as error:
            skipped[of_conv[0]] = str(error)
    if not exchanged:
        raise ValueError(
            f'no conv of {type(model).__name__} was re-parameterised: none with a name '
            f'like {include} and not like {list(exclude)} has a fold. '
            f'{_by_reason(skipped) or "It has no plain conv"}'
        )
    for conv, form in exchanged.items():
        conv.__class__ = type(form)
        vars(conv).update(vars(form))
    count = sum(map(has_branches, exchanged))
    print_log(
        f'{type(model).__name__}: {count} convs re-parameterised ({block}), '
        f'{len(skipped)} left as they are. {_by_reason(skipped)}'.rstrip(),
        logger='current',
    )
    return model


def reparameterize(*args, **kwargs) -> None:
    """The former name of :func:`add_branches`. Always raises a TypeError."""
    raise TypeError(
        'mmorepa.reparameterize is called mmorepa.add_branches now, since elsewhere '
        'the word means to fuse branches, which mmorepa.switch_to_deploy does'
    )


@MODELS.register_module(name='Reparameterized')
def build_with_branches(module: dict, **kwargs) -> nn.Module:
    """Builds a module and calls :func:`add_branches` on it.

    In a config: ``backbone=dict(type='Reparameterized', module=dict(type='ConvNeXt',
    ...))``. It can load weights of the plain module later, by ``init_cfg`` or
    ``load_from``.
    """
    return add_branches(MODELS.build(module), **kwargs)


def log_plain_starts(model: nn.Module) -> None:
    """Logs once how many convs started from plain kernels in the last load."""
    convs = [m for m in model.modules() if getattr(m, 'is_plain_start', False)]
    for conv in convs:
        conv.is_plain_start = False
    count = sum(map(has_branches, convs))
    if count:
        print_log(
            f'{type(model).__name__}: {count} re-parameterised convs start from the '
            'plain kernels of the checkpoint (quiet start)',
            logger='current',
        )


def has_branches(conv: nn.Module) -> bool:
    """Whether a conv is a training form with more than a single plain kernel."""
    is_form = isinstance(conv, ReparamConv2d) and not isinstance(conv, PlainConv2d)
    return is_form and not conv.deployed


def _by_reason(skipped: dict[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    return '; '.join(f'{", ".join(n)}: {reason}' for reason, n in names.items())


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_is_plain(conv: nn.Module) -> None:
    """Raises a ValueError if a conv may compute or hold more than a plain conv."""
    if type(conv) not in _PLAIN_CONVS:
        raise ValueError(f'a {type(conv).__name__}')
    if conv._parameters.get('weight') is None:
        raise ValueError('its weight is computed from others')
    if has_hooks(conv) or any(map(has_hooks, conv.parameters())):
        raise ValueError('has hooks')
    methods = [name for name, value in vars(conv).items() if callable(value)]
    parts = sorted({*conv._parameters, *conv._buffers, *conv._modules})
    for name in (*methods, *parts):
        if name not in ('weight', 'bias'):
            raise ValueError(f'has a {name} of its own')


def _training_form(
    conv: nn.Conv2d, block: str, block_cfg: Optional[dict]
) -> ReparamConv2d:
    if len(set(conv.kernel_size)) > 1:
        raise ValueError(f'kernel_size={conv.kernel_size} is not square')
    names = ('in_channels', 'out_channels', 'stride', 'padding', 'dilation')
    arguments = {n: getattr(conv, n) for n in (*names, 'groups', 'padding_mode')}
    arguments.update(kernel_size=conv.kernel_size[0], bias=conv.bias is not None)
    form = build_conv(block, block_cfg=block_cfg, **arguments)
    for name in vars(conv).keys() - OF_CONVS:
        if hasattr(form, name):
            raise ValueError(f'has a {name} of its own')
    form.to(conv.weight)
    form.channels_last = not conv.weight.is_contiguous() and conv.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    form.start_from(conv.weight, conv.bias)
    form.branches.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        form.bias.requires_grad_(conv.bias.requires_grad)
        vars(form.bias).update(vars(conv.bias))
    for parameter in form.branches.parameters():
        vars(parameter).update(vars(conv.weight))
    return form.train(conv.training)
