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


class _Entry(NamedTuple):
    """What an entry of the published layout becomes.

    ``ours`` is None for entries that the published code saves though they are fixed;
    ``fixed`` makes them.
    """

    ours: Optional[str]
    shape: tuple[int, ...]
    to_ours: Callable[[Tensor], Tensor] = lambda x: x
    fixed: Optional[Callable[[], Tensor]] = None


Entries = Iterator[tuple[str, _Entry]]


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
    deployed = not any(key.endswith('running_mean') for key in theirs)
    # Only names and shapes are asked of it: no memory, no time, no random numbers.
    with torch.device('meta'):
        network = MODELS.build(dict(backbone, deploy=deployed))
    entries = dict(_entries(network, theirs))
    for key, value in theirs.items():
        conv = key.removesuffix('.rbr_dense.vector')
        if f'{conv}.rbr_identity.weight' in theirs and value.shape[:1] == (6,):
            # The last row is neither used nor initialised by the published code.
            theirs[key] = value[:5]
    _check(entries, theirs)
    ours = {
        entry.ours: entry.to_ours(theirs[key]).clone()
        for key, entry in entries.items()
        if entry.ours is not None
    }
    meta = dict(
        mmorepa_version=__version__,
        architecture=name_of(backbone),
        backbone=backbone,
        deployed=deployed,
    )
    return dict(meta=meta, state_dict=ours)


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


def _check(entries: Mapping[str, _Entry], theirs: Mapping[str, Tensor]) -> None:
    expected = {key: entry.shape for key, entry in entries.items()}
    found = {key: tuple(value.shape) for key, value in theirs.items()}
    wrong = []
    for key, entry in entries.items():
        if entry.fixed is not None and found.get(key) == entry.shape:
            value, fixed = theirs[key], entry.fixed()
            # Rounded as the checkpoint is.
            fixed = fixed.to(value.dtype).double()
            if not torch.allclose(value.double(), fixed, atol=1e-5):
                wrong.append(key)
    problems = (
        describe_misfit(expected, found, None),
        name_keys('fixed in the published code, with other values', wrong, None),
    )
    if any(problems):
        raise CheckpointError(
            f'the checkpoint does not fit: {"; ".join(filter(None, problems))}'
        )


def _entries(network: nn.Module, theirs: Mapping[str, Tensor]) -> Entries:
    """All entries of our backbone, and those of a classifier if there is one."""
    for name, conv in outermost(network):
        for key, entry in _conv_entries(conv):
            key = f'{_published_name(name)}.{key}'
            # Some versions of the published code save it.
            if key.endswith('idconv1.id_tensor') and key not in theirs:
                continue
            if entry.ours is not None:
                entry = entry._replace(ours=f'backbone.{name}.{entry.ours}')
            yield key, entry
    for name, value in network.state_dict().items():
        if '.se.' in name:
            yield _published_name(name), _Entry(f'backbone.{name}', tuple(value.shape))
    head = [
        theirs[f'linear.{n}'] for n in ('weight', 'bias') if f'linear.{n}' in theirs
    ]
    if head:
        # The number of classes is the checkpoint's affair.
        classes = tuple(head[0].shape[:1])
        shape = (*classes, network.feat_dim)
        yield 'linear.weight', _Entry('head.fc.weight', shape)
        yield 'linear.bias', _Entry('head.fc.bias', classes)


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


def _conv_entries(conv: ReparamConv2d) -> Entries:
    kinds = [kind for kind in _PREFIXES if isinstance(conv, kind)]
    if not kinds:
        raise CheckpointError(
            f'the published code has no layout for {type(conv).__name__}'
        )
    prefixes = _PREFIXES[kinds[0]]
    if conv.deployed:
        prefixes = {'': f'{_deployed_name(conv)}.'}
    is_rbr = isinstance(conv, RepVGGConv2d)
    kind = 'rbr' if is_rbr else 'or1x1' if conv.kernel_size[0] == 1 else 'orepa'
    for key, value in conv.state_dict().items():
        here = next(prefix for prefix in prefixes if key.startswith(prefix))
        path, dot, entry = (prefixes[here] + key.removeprefix(here)).rpartition('.')
        there = path + dot + _ENTRIES.get(entry, entry).format(kind)
        kernel = conv.get_submodule(key.rpartition('.')[0])
        if isinstance(kernel, OREPAKernel):
            value = kernel.branch_sum.as_conv(entry, value)
            to_ours = partial(_to_ours, kernel.branch_sum, entry)
            yield there, _Entry(key, tuple(value.shape), to_ours)
        else:
            yield there, _Entry(key, tuple(value.shape))
        if entry == 'scale' and isinstance(kernel, OREPAKernel):
            yield from _fixed_entries(kernel, path + dot, kind)
    if isinstance(conv, DBBConv2d) and not conv.deployed:
        shape = conv.in_channels, conv.in_channels // conv.groups
        yield (
            'dbb_1x1_kxk.idconv1.id_tensor',
            _Entry(None, (*shape, 1, 1), fixed=partial(identity_1x1, *shape)),
        )


def _fixed_entries(kernel: OREPAKernel, there: str, kind: str) -> Entries:
    """The constants that the published code saves."""
    outputs, _, size, _ = kernel.branch_sum.shape
    square, eye = (size, size), kernel.weight_pointwise_kxk_1.shape[:2]
    average = partial(torch.full, square, 1 / size**2)
    prior = partial(frequency_prior, outputs, size)
    identity = partial(identity_1x1, *eye)
    yield f'{there}weight_{kind}_avg_avg', _Entry(None, square, fixed=average)
    yield f'{there}weight_{kind}_prior', _Entry(None, (outputs, *square), fixed=prior)
    yield f'{there}id_tensor', _Entry(None, (*eye, 1, 1), fixed=identity)


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
        weight = weight.unflatten(0, (-1, spec.groups)).transpose(0, 1).flatten(0, 1)
    return spec.as_stored(name, weight)
