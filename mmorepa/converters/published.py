"""Checkpoints in the layout of the published training code.

A published checkpoint has the keys ``stage0`` to ``stage4`` and ``linear``, each
conv with the keys of its block (``weight_orepa_origin``, ``dbb_1x1.conv.weight``,
…). The pairs of keys are made from our own network, so that every entry of both
sides is accounted for.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Optional

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..functional import BranchSum, frequency_prior, identity_1x1
from ..layers import (
    DBBConv2d,
    OREPAConv2d,
    OREPAKernel,
    PlainConv2d,
    ReparamConv2d,
    RepVGGConv2d,
    outermost,
)
from ..layers.deep_linear import DEEP_LINEAR_FROM
from ..utils.errors import CheckpointError, describe_misfit, name_keys
from ..version import __version__
from .architectures import identify, name_of


class _Pair(NamedTuple):
    """An entry of our layout, and the same entry of the published one.

    ``ours`` is None for entries that the published code saves though they are fixed;
    ``fixed`` makes them. ``to_ours`` reorders rows or dimensions; ``as_conv`` gives an
    entry of ours the shape of theirs.
    """

    theirs: str
    ours: Optional[str]
    fixed: Optional[Callable[[], Tensor]] = None
    to_ours: Callable[[Tensor], Tensor] = lambda x: x
    as_conv: Callable[[Tensor], Tensor] = lambda x: x


def from_published(
    state_dict: Mapping[str, Tensor], backbone: Optional[dict] = None
) -> dict:
    """Translates a published state dict.

    Args:
        state_dict (Mapping[str, Tensor]): Training or deployed form, with or without
            ``module.`` before every key.
        backbone (dict, optional): The backbone config. Defaults to None: that which
            keys and shapes tell.

    Returns:
        dict: ``state_dict`` (``backbone.*`` and ``head.fc.*``) and ``meta``, with the
        architecture and the backbone config.

    Raises:
        CheckpointError: If entries, which are named, are missing, left over, misshapen
            or have other values than the published constants.
    """
    theirs = _canonical(
        {key.removeprefix('module.'): value for key, value in state_dict.items()}
    )
    if backbone is None:
        backbone = identify(theirs)
    deployed = _is_deployed(theirs)
    network = _build(backbone, deployed)
    pairs = list(_pairs(network, set(theirs)))
    for key in [p.theirs for p in pairs if _has_unused_row(network, p)]:
        if key in theirs and theirs[key].shape[:1] == (6,):
            # Neither used nor initialised by the published code.
            theirs[key] = theirs[key][:5]
    _check(pairs, theirs, _own_shapes(network, theirs))

    ours = {
        pair.ours: pair.to_ours(theirs[pair.theirs]).clone()
        for pair in pairs
        if pair.ours is not None
    }
    meta = dict(
        mmorepa_version=__version__,
        architecture=name_of(backbone),
        backbone=backbone,
        deployed=deployed,
    )
    return dict(meta=meta, state_dict=ours)


def _build(backbone: dict, deployed: bool) -> nn.Module:
    # Only names and shapes are asked of it: no memory, no time, no random numbers.
    with torch.device('meta'):
        return MODELS.build(dict(backbone, deploy=deployed))


def _is_deployed(theirs: Mapping[str, Tensor]) -> bool:
    return not any(key.endswith('running_mean') for key in theirs)


def _has_unused_row(network: nn.Module, pair: _Pair) -> bool:
    """Whether a scaling vector has one row more than the kernel has branches."""
    if not pair.theirs.endswith('rbr_dense.vector'):
        return False
    name, _, _ = pair.ours.removeprefix('backbone.').partition('.branches.')
    return 'identity' in network.get_submodule(name).branches


# Spellings of one entry in different versions of the published code.
_SYNONYMS = (
    (r'\b(weight_)?(or1x1_)?l2i_conv([12])$', r'weight_or1x1_l2i_conv\3'),
    (r'\bdbb_1x1_kxk\.idconv1\.weight$', 'dbb_1x1_kxk.idconv1.conv.weight'),
)


def _canonical(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One spelling for every entry."""
    canonical: dict[str, Tensor] = {}
    for key, value in theirs.items():
        name = key
        for pattern, replacement in _SYNONYMS:
            name = re.sub(pattern, replacement, name)
        if name != key and (name in theirs or name in canonical):
            name = key  # There is another one: left over.
        canonical[name] = value
    return canonical


def _own_shapes(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple]:
    shapes = {f'backbone.{k}': tuple(v.shape) for k, v in network.state_dict().items()}
    for key in _head(state)[:1]:
        # The number of classes is the checkpoint's affair.
        classes = tuple(state[key].shape[:1])
        shapes['head.fc.weight'] = (*classes, network.feat_dim)
        shapes['head.fc.bias'] = classes
    return shapes


def _head(state: Mapping[str, Tensor]) -> list[str]:
    """The keys of the classifier that exist, in either layout."""
    return [
        f'{layer}.{entry}'
        for entry in ('weight', 'bias')
        for layer in ('linear', 'head.fc')
        if f'{layer}.{entry}' in state
    ]


def _check(
    pairs: list[_Pair], theirs: Mapping[str, Tensor], shapes: dict[str, tuple]
) -> None:
    expected, wrong = {}, []
    for pair in pairs:
        key, fixed = pair.theirs, None if pair.fixed is None else pair.fixed()
        if fixed is None:
            like = pair.as_conv(torch.empty(shapes[pair.ours], device='meta'))
        else:
            like = fixed
        expected[key] = tuple(like.shape)
        if fixed is None or key not in theirs or theirs[key].shape != fixed.shape:
            continue
        value = theirs[key]
        if not torch.allclose(
            value.double(), fixed.to(value.dtype).double(), atol=1e-5
        ):
            wrong.append(key)
    problems = (
        describe_misfit(expected, {k: tuple(v.shape) for k, v in theirs.items()}, None),
        name_keys('fixed in the published code, with other values', wrong, None),
    )
    if any(problems):
        raise CheckpointError(
            f'the checkpoint does not fit: {"; ".join(filter(None, problems))}'
        )


def _pairs(network: nn.Module, present: set[str]) -> Iterator[_Pair]:
    """All pairs of our backbone; of optional entries those whose keys are present."""
    for name, conv in outermost(network):
        there, here = _published_name(name), f'backbone.{name}.'
        for pair in _conv_pairs(conv):
            theirs = f'{there}.{pair.theirs}'
            if theirs.endswith(_OPTIONAL) and theirs not in present:
                continue
            ours = None if pair.ours is None else here + pair.ours
            yield pair._replace(theirs=theirs, ours=ours)
    for name in network.state_dict():
        if '.se.' in name:
            yield _Pair(_published_name(name), f'backbone.{name}')
    if present & {'linear.weight', 'linear.bias'}:
        for entry in ('weight', 'bias'):
            yield _Pair(f'linear.{entry}', f'head.fc.{entry}')


# Saved by some versions of the published code.
_OPTIONAL = 'dbb_1x1_kxk.idconv1.id_tensor'


def _published_name(name: str) -> str:
    """'layer1.0.downsample' becomes 'stage1.0.shortcut'."""
    name = re.sub(r'^stem\.conv$', 'stage0', name)
    name = re.sub(r'^stem$', 'stage0.conv1', name)
    name = re.sub(r'^stem\.', 'stage0.', name)
    name = re.sub(r'^layer(\d)', r'stage\1', name)
    return re.sub(r'\.conv$', '', name.replace('.downsample', '.shortcut'))


# The beginnings of the entries of a conv, ours and theirs.
_PREFIXES = {
    DBBConv2d: {
        'branches.origin.branches.': 'dbb_origin.conv.',
        'branches.origin.norm.': 'dbb_origin.bn.',
        'branches.pointwise.branches.': 'dbb_1x1.conv.',
        'branches.pointwise.norm.': 'dbb_1x1.bn.',
        'branches.average.first.branches.': 'dbb_avg.conv.',
        'branches.average.first.norm.': 'dbb_avg.bn.bn.',
        'branches.average.second.norm.': 'dbb_avg.avgbn.',
        'branches.pointwise_kxk.first.branches.': 'dbb_1x1_kxk.idconv1.conv.',
        'branches.pointwise_kxk.first.norm.': 'dbb_1x1_kxk.bn1.bn.',
        'branches.pointwise_kxk.second.branches.': 'dbb_1x1_kxk.conv2.',
        'branches.pointwise_kxk.second.norm.': 'dbb_1x1_kxk.bn2.',
    },
    RepVGGConv2d: {
        'branches.origin.branches.weight_': 'rbr_dense.weight_',
        'branches.origin.branches.scale': 'rbr_dense.scale',
        'branches.origin.branches.': 'rbr_dense.conv.',
        'branches.origin.norm.': 'rbr_dense.bn.',
        'branches.pointwise.branches.': 'rbr_1x1.conv.',
        'branches.pointwise.norm.': 'rbr_1x1.bn.',
        'branches.identity.norm.': 'rbr_identity.',
    },
    PlainConv2d: {'branches.': 'conv.', 'norm.': 'bn.'},
    OREPAConv2d: {'branches.factors.': 'weight', 'branches.': '', 'norm.': 'bn.'},
}
# The parameters of OREPA's kernels.
_ENTRIES = {
    'weight_origin': 'weight_{}_origin',
    'weight_average': 'weight_{}_avg_conv',
    'weight_frequency': 'weight_{}_pfir_conv',
    'weight_pointwise_kxk_1': 'weight_{}_1x1_kxk_idconv1',
    'weight_pointwise_kxk_2': 'weight_{}_1x1_kxk_conv2',
    'weight_pointwise': 'weight_{}_1x1',
    'weight_depthwise': 'weight_{}_gconv_dw',
    'weight_separable': 'weight_{}_gconv_pw',
    'weight_first': 'weight_{}_l2i_conv1',
    'weight_second': 'weight_{}_l2i_conv2',
    'scale': 'vector',
}


def _conv_pairs(conv: ReparamConv2d) -> Iterator[_Pair]:
    kinds = [kind for kind in _PREFIXES if isinstance(conv, kind)]
    if not kinds:
        raise CheckpointError(
            f'the published code has no layout for {type(conv).__name__}'
        )
    prefixes = (
        {'': f'{_deployed_name(conv)}.'} if conv.deployed else _PREFIXES[kinds[0]]
    )
    kind = 'or1x1' if conv.kernel_size[0] == 1 else 'orepa'
    kind = 'rbr' if isinstance(conv, RepVGGConv2d) else kind
    for key in conv.state_dict():
        here = next(prefix for prefix in prefixes if key.startswith(prefix))
        path, dot, entry = (prefixes[here] + key.removeprefix(here)).rpartition('.')
        there = path + dot
        pair = _Pair(there + _ENTRIES.get(entry, entry).format(kind), key)
        kernel = conv.get_submodule(key.rpartition('.')[0])
        if isinstance(kernel, OREPAKernel):
            pair = pair._replace(
                to_ours=partial(_to_ours, kernel.branch_sum, entry),
                as_conv=partial(kernel.branch_sum.as_conv, entry),
            )
        yield pair
        if entry == 'scale' and isinstance(kernel, OREPAKernel):
            yield from _fixed_pairs(kernel, there, kind)
    if isinstance(conv, DBBConv2d) and not conv.deployed:
        channels, inputs = conv.in_channels, conv.in_channels // conv.groups
        yield _Pair(_OPTIONAL, None, lambda: identity_1x1(channels, inputs))


def _fixed_pairs(kernel: OREPAKernel, there: str, kind: str) -> Iterator[_Pair]:
    """The constants that the published code saves."""
    size, outputs = kernel.kernel_size, kernel.scale.shape[1]
    hidden, inputs = kernel.weight_pointwise_kxk_1.shape[:2]
    fixed = {
        f'weight_{kind}_avg_avg': lambda: torch.full((size, size), 1 / size**2),
        f'weight_{kind}_prior': lambda: frequency_prior(outputs, size),
        'id_tensor': lambda: identity_1x1(hidden, inputs),
    }
    for entry, make in fixed.items():
        yield _Pair(there + entry, None, make)


def _deployed_name(conv: ReparamConv2d) -> str:
    if isinstance(conv, RepVGGConv2d):
        return 'rbr_reparam'
    if isinstance(conv, DBBConv2d):
        return 'dbb_reparam'
    if isinstance(conv, PlainConv2d):
        return 'conv'
    size = conv.kernel_size[0]
    if size == 1:
        return 'or1x1_reparam'
    return 'orepa_reparam' if size < DEEP_LINEAR_FROM else 'or_large_reparam'


def _to_ours(spec: BranchSum, name: str, weight: Tensor) -> Tensor:
    if name == 'weight_separable':
        # The published code interleaves the groups in the rows of this one.
        rows = weight.unflatten(0, (-1, spec.groups))
        weight = rows.transpose(0, 1).flatten(0, 1)
    return spec.as_stored(name, weight)
