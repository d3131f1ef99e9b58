"""Replaces plain convs of any model by training forms."""

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
from torch.nn.utils.parametrize import is_parametrized

from .blocks import build_conv, conv_type
from .conv import ReparamConv2d
from .plain import PlainConv2d
from .references import hidden_modules, parallel_wrapper, replace_modules
from .switch import has_hooks, outermost, overrides, registered, user_attributes

# What conv layers of mmcv add is for empty batches in old versions of PyTorch.
_PLAIN_CONVS = (nn.Conv2d, mmcv.cnn.Conv2d)


def add_branches(
    model: nn.Module,
    block: str = 'orepa',
    include: Union[str, Sequence[str]] = '*',
    exclude: Union[str, Sequence[str]] = (),
    block_cfg: Optional[dict] = None,
) -> nn.Module:
    """Replaces a model's convs by training forms; the model computes the same.

    Each starts from the kernel of the conv whose place it takes; names of modules,
    devices, dtypes, ``requires_grad`` and the mode stay. :func:`switch_to_deploy`
    gives the plain model back, with a state dict that the original class loads.

    Left alone, and named in a line of the log, are convs that have no exact fold (even
    or non-square kernels, other padding than with zeros, depthwise 7×7 kernels) and
    those that may compute something else: subclasses of :class:`torch.nn.Conv2d`, and
    convs with hooks, a parametrization, a shared parameter, or a method, parameter,
    buffer or module of their own. Other attributes go along.

    Args:
        model (nn.Module): Any model; it is changed in place.
        block (str): Block type, a name in :data:`mmorepa.layers.BLOCKS`. The convs of
            ``'dbb'``, ``'repvgg'`` and ``'orepa_repvgg'`` have BatchNorms: they compute
            the same in eval mode, and while training where another BatchNorm follows,
            and are deployed with a bias. Defaults to ``'orepa'``.
        include (str | Sequence[str]): Patterns such as ``'backbone.*'`` of the names
            of convs to exchange. Defaults to ``'*'``.
        exclude (str | Sequence[str]): Those to leave alone. Defaults to none.
        block_cfg (dict, optional): Arguments that only convs of this block type take.
            Defaults to None.

    Returns:
        nn.Module: ``model``, or what takes its place if it is a conv itself.

    Raises:
        ValueError: If the block type is not known, no conv was exchanged, or a pattern
            fits no module.
        RuntimeError: If the model is wrapped for data parallelism.

    Examples:
        >>> net = torchvision.models.resnet50(weights='DEFAULT')
        >>> mmorepa.add_branches(net, exclude='layer1.*')
    """
    conv_type(block, 3)  # Raises for an unknown one.
    wrapper = parallel_wrapper(model)
    if wrapper is not None:
        raise RuntimeError(
            f'{type(wrapper).__name__} is around the model, and would not average the '
            'gradients of branches that come later: call mmorepa.add_branches(model) '
            'first, and wrap it then'
        )
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    names: dict[nn.Module, list[str]] = {}  # A shared module has several.
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for pattern in (*include, *exclude):
        if not any(_matches(of_one, [pattern]) for of_one in names.values()):
            raise ValueError(
                f'{type(model).__name__} has no module with a name like {pattern!r}'
            )
    forms = {conv: name for name, conv in outermost(model)}
    inside = {part for form in forms for part in form.modules()}
    users = Counter(p for module in names for p in module._parameters.values())
    hidden = hidden_modules(model)
    exchanged: dict[nn.Module, nn.Module] = {}
    left: dict[str, str] = {}
    for conv, of_conv in names.items():
        if not isinstance(conv, _ConvNd) or conv in inside:
            continue
        try:
            if not _matches(of_conv, include) or _matches(of_conv, exclude):
                raise ValueError('left out by include or exclude')
            _check_is_plain(conv)
            if any(users[p] > 1 for p in conv.parameters()):
                raise ValueError('shares a parameter')
            if conv in hidden:
                place = f'{hidden[conv]} holds it in a place that cannot be changed'
                raise ValueError(place)
            exchanged[conv] = _training_form(conv, block, block_cfg)
            if block != 'plain' and not has_branches(exchanged[conv]):
                left[of_conv[0]] = f'a {block} network has no branches there'
        except ValueError as error:
            left[of_conv[0]] = str(error)
    if not exchanged:
        for form, name in forms.items():
            left[name] = 'deployed' if form.deployed else 're-parameterised already'
        raise ValueError(
            f'no conv of {type(model).__name__} was re-parameterised: none with a name '
            f'like {include} and not like {list(exclude)} has a fold. '
            f'{_by_reason(left) or "It has no conv, or its convs are functions"}'
        )
    replace_modules(model, exchanged)
    count = sum(map(has_branches, exchanged.values()))
    print_log(
        f'{type(model).__name__}: {count} convs re-parameterised ({block}), '
        f'{len(left)} left as they are. {_by_reason(left)}'.rstrip(),
        logger='current',
    )
    return exchanged.get(model, model)


def reparameterize(*args, **kwargs) -> None:
    """The former name of :func:`add_branches`, which is an error."""
    raise TypeError(
        'mmorepa.reparameterize is called mmorepa.add_branches now, since elsewhere '
        'the word means to fuse branches, which mmorepa.switch_to_deploy does'
    )


@MODELS.register_module(name='Reparameterized')
def build_with_branches(module: dict, **kwargs) -> nn.Module:
    """Builds a module and exchanges its convs, as :func:`add_branches` does it.

    In a config: ``backbone=dict(type='Reparameterized', module=dict(type='ConvNeXt',
    ...))``. Weights that are loaded later, by ``init_cfg`` or ``load_from``, may be
    those of the plain module.
    """
    return add_branches(MODELS.build(module), **kwargs)


def log_plain_starts(model: nn.Module) -> None:
    """Logs once how many convs started from plain kernels of the last state dict."""
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
    """Whether a conv is a training form of more than one plain kernel."""
    is_form = isinstance(conv, ReparamConv2d) and not isinstance(conv, PlainConv2d)
    return is_form and not conv.deployed


def _by_reason(left: dict[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    return '; '.join(f'{", ".join(n)}: {reason}' for reason, n in names.items())


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_is_plain(conv: nn.Module) -> None:
    """Raises a ValueError if a conv may compute, or hold, more than a plain one."""
    if type(conv) not in _PLAIN_CONVS:
        raise ValueError(f'a {type(conv).__name__}')
    if is_parametrized(conv) or conv._parameters.get('weight') is None:
        raise ValueError('its weight is computed from others')
    if has_hooks(conv) or any(map(has_hooks, conv.parameters())):
        raise ValueError('has hooks')
    additions = [*overrides(conv), *sorted(registered(conv) - {'weight', 'bias'})]
    additions += [n for n in user_attributes(conv) if hasattr(ReparamConv2d, n)]
    if additions:
        raise ValueError(f'has a {additions[0]} of its own')
    tensors = [v for p in conv.parameters() for v in vars(p).values()]
    if any(isinstance(value, torch.Tensor) for value in tensors):
        raise ValueError('its parameters have tensors of their own')


def _training_form(
    conv: nn.Conv2d, block: str, block_cfg: Optional[dict]
) -> ReparamConv2d:
    if len(set(conv.kernel_size)) > 1:
        raise ValueError(f'kernel_size={conv.kernel_size} is not square')
    names = ('in_channels', 'out_channels', 'stride', 'padding', 'dilation')
    arguments = {n: getattr(conv, n) for n in (*names, 'groups', 'padding_mode')}
    arguments.update(kernel_size=conv.kernel_size[0], bias=conv.bias is not None)
    form = build_conv(block, block_cfg=block_cfg, **arguments)
    form.to(conv.weight)
    form.channels_last = not conv.weight.is_contiguous() and conv.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    form.start_from(conv.weight, conv.bias)
    form.branches.requires_grad_(conv.weight.requires_grad)
    if conv.bias is not None:
        form.bias.requires_grad_(conv.bias.requires_grad)
        vars(form.bias).update(vars(conv.bias))
    vars(form).update(user_attributes(conv))
    for parameter in form.branches.parameters():
        vars(parameter).update(vars(conv.weight))
    return form.train(conv.training)
