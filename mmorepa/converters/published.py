"""Translates checkpoints of the published training code.

Published keys start with ``stage0`` to ``stage4`` or ``linear``. They end with a weight
of a block, such as ``weight_orepa_origin`` or ``dbb_1x1.conv.weight``.
"""

from collections.abc import Mapping
from typing import Optional

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..backbones.plain_names import renamed
from ..functional import BranchSum, frequency_prior, identity_1x1
from ..layers import OREPAKernel
from ..utils.errors import CheckpointError, describe_misfit, name_keys
from ..version import __version__
from .architectures import identify

# Patterns for parts of the published names, and the same parts in our names. Each
# replacement applies to the result of the one before.
_NAMES = (
    (r'^linear\.', 'head.fc.'),
    (r'^stage0\.(conv1\.)?', 'stem.'),
    (r'^stage(\d)\.', r'layer\1.'),
    (r'\.shortcut\.', '.downsample.'),
    (r'\.conv\.', '.branches.'),
    (r'\.bn\.', '.norm.'),
    (r'\.rbr_reparam\.', '.conv.'),
    (r'\.(dbb|orepa|or1x1|or_large)_reparam\.', '.'),
    (r'\.rbr_dense\.(branches|norm)\.', r'.conv.branches.origin.\1.'),
    (r'\.rbr_dense\.', '.conv.branches.origin.branches.'),
    (r'\.rbr_1x1\.', '.conv.branches.pointwise.'),
    (r'\.rbr_identity\.', '.conv.branches.identity.norm.'),
    (r'\.dbb_origin\.', '.branches.origin.'),
    (r'\.dbb_1x1\.', '.branches.pointwise.'),
    (r'\.dbb_avg\.branches\.', '.branches.average.first.branches.'),
    (r'\.dbb_avg\.norm\.bn\.', '.branches.average.first.norm.'),
    (r'\.dbb_avg\.avgbn\.', '.branches.average.second.norm.'),
    (r'\.dbb_1x1_kxk\.', '.branches.pointwise_kxk.'),
    (r'_kxk\.idconv1\.(branches\.)?', '_kxk.first.branches.'),
    (r'_kxk\.bn1\.norm\.', '_kxk.first.norm.'),
    (r'_kxk\.conv2\.', '_kxk.second.branches.'),
    (r'_kxk\.bn2\.', '_kxk.second.norm.'),
    # The weights of OREPA's kernels.
    (r'\.weight(\d)\.', r'.branches.factors.\1.'),
    (r'^((?!.*branches).*)\.(weight_|(or1x1_)?l2i_|vector)', r'\1.branches.\2'),
    (r'\.vector$', '.scale'),
    (r'\.weight_(orepa|rbr|or1x1)_', '.weight_'),
    (r'\.weight_avg_conv$', '.weight_average'),
    (r'\.weight_pfir_conv$', '.weight_frequency'),
    (r'\.weight_1x1_kxk_idconv1$', '.weight_pointwise_kxk_1'),
    (r'\.weight_1x1_kxk_conv2$', '.weight_pointwise_kxk_2'),
    (r'\.weight_1x1$', '.weight_pointwise'),
    (r'\.weight_gconv_dw$', '.weight_depthwise'),
    (r'\.weight_gconv_pw$', '.weight_separable'),
    # Versions of the published code have several names for these.
    (r'\.(weight_)?(or1x1_)?l2i_conv1$', '.weight_first'),
    (r'\.(weight_)?(or1x1_)?l2i_conv2$', '.weight_second'),
)


def from_published(
    state_dict: Mapping[str, Tensor], backbone: Optional[dict] = None
) -> dict:
    """Translates a published state dict.

    Args:
        state_dict (Mapping[str, Tensor]): Training or deployed form, with or without
            ``module.`` before every key.
        backbone (dict, optional): The backbone config. Defaults to None: the keys and
            shapes tell it.

    Returns:
        dict: ``state_dict`` (``backbone.*`` and ``head.fc.*``) and ``meta``, with the
        ``backbone`` config and whether the checkpoint is ``deployed``.

    Raises:
        CheckpointError: If weights are missing, left over or of another shape, or if a
            published constant has another value. The error names these entries. The
            constants may be missing.
    """
    published = {k.removeprefix('module.'): value for k, value in state_dict.items()}
    if backbone is None:
        backbone = identify(published)
    deployed = not any(key.endswith('running_mean') for key in published)
    # Only its names and shapes are needed: no memory, no time, no random numbers.
    with torch.device('meta'):
        network = MODELS.build(dict(backbone, deploy=deployed))
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    specs = _specs(network)
    for key, spec in specs.items():
        stored = torch.empty(expected[key], device='meta')
        expected[key] = tuple(spec.as_conv(key.rpartition('.')[2], stored).shape)

    # The published keys, by our names.
    names: dict[str, str] = {}
    wrong = []
    for key, value in published.items():
        fixed = _fixed(key, value)
        if fixed is None:
            name = _our_name(key, deployed)
            names[name if name not in names else key] = key
        # Round the constant to the dtype of the checkpoint.
        elif not torch.allclose(value, fixed.to(value.dtype), atol=1e-5):
            wrong.append(key)
        if key.endswith('.rbr_dense.vector') and value.shape[:1] == (6,):
            # The published code neither uses nor initialises the last row.
            published[key] = value[:5]
    if names.keys() & {'head.fc.weight', 'head.fc.bias'}:
        # The checkpoint may have any number of classes.
        key = names.get('head.fc.bias') or names['head.fc.weight']
        classes = tuple(published[key].shape[:1])
        expected['head.fc.weight'] = (*classes, network.feat_dim)
        expected['head.fc.bias'] = classes
    problems = (
        describe_misfit(
            {names.get(name, name): shape for name, shape in expected.items()},
            {key: tuple(published[key].shape) for key in names.values()},
            None,
        ),
        name_keys('fixed in the published code, with other values', wrong, None),
    )
    if any(problems):
        raise CheckpointError(
            f'the checkpoint does not fit: {"; ".join(filter(None, problems))}'
        )
    translated = {}
    for name, key in names.items():
        value = published[key]
        if name in specs:
            value = _as_stored(specs[name], name.rpartition('.')[2], value)
        whole = name if name.startswith('head.') else f'backbone.{name}'
        translated[whole] = value.clone()
    meta = dict(mmorepa_version=__version__, backbone=backbone, deployed=deployed)
    return dict(meta=meta, state_dict=translated)


def _our_name(key: str, deployed: bool) -> str:
    key = renamed(key, _NAMES)
    return key.replace('.branches.', '.') if deployed else key


def _specs(network: nn.Module) -> dict[str, BranchSum]:
    """The :class:`BranchSum` of each weight in OREPA's kernels, by the weight's key."""
    return {
        f'{name}.{entry}': kernel.branch_sum
        for name, kernel in network.named_modules()
        if isinstance(kernel, OREPAKernel)
        for entry in kernel.branch_sum.roles
    }


def _fixed(key: str, value: Tensor) -> Optional[Tensor]:
    """The value of an entry if the published code keeps it constant, else None."""
    fixed = None
    if key.endswith('_avg_avg'):
        fixed = torch.full_like(value, 1 / max(value.numel(), 1))
    elif key.endswith('_prior') and value.dim() == 3:
        fixed = frequency_prior(len(value), value.shape[-1])
    elif key.endswith('.id_tensor') and value.dim() == 4:
        fixed = identity_1x1(*value.shape[:2])
    return fixed if fixed is not None and fixed.shape == value.shape else None


def _as_stored(spec: BranchSum, name: str, weight: Tensor) -> Tensor:
    if name == 'weight_separable':
        # The published code interleaves the groups in the rows of this weight.
        weight = weight.unflatten(0, (-1, spec.groups)).transpose(0, 1).flatten(0, 1)
    return spec.as_stored(name, weight)
