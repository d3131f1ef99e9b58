"""RepVGG networks whose 3×3 branches are re-parameterised further."""

import itertools
from collections.abc import Collection, Sequence
from functools import partial
from typing import Optional, Union

import torch.utils.checkpoint as cp
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from .plain_names import repvgg_name
from .staged_backbone import StagedBackbone, build_same_conv, scaled_channels


class SqueezeExcitation(nn.Module):
    """``x · sigmoid(up(relu(down(mean(x)))))`` (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        gate = self.down(x.mean(dim=(2, 3), keepdim=True)).relu()
        return x * self.up(gate).sigmoid()


class RepVGGBlock(BaseModule):
    """A 3×3 conv of several branches, optional squeeze-excitation, activation.

    Takes the arguments of :class:`OREPARepVGG`, for one block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        use_se: bool = False,
        act_cfg: Optional[dict] = None,
        with_cp: bool = False,
        **options,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.conv = build_same_conv(in_channels, out_channels, 3, **options)
        self.se = SqueezeExcitation(out_channels) if use_se else None
        self.act = build_activation_layer(act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, I, H, W) to (N, O, H/stride, W/stride)."""
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.act(x if self.se is None else self.se(x))


def _architectures() -> dict[str, dict]:
    """The blocks and the width multiplier of each stage, and further options."""
    few, many, most = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
    table = {
        'A0': dict(num_blocks=few, widths=(0.75, 0.75, 0.75, 2.5)),
        'A1': dict(num_blocks=few, widths=(1, 1, 1, 2.5)),
        'A2': dict(num_blocks=few, widths=(1.5, 1.5, 1.5, 2.75)),
        'B0': dict(num_blocks=many, widths=(1, 1, 1, 2.5)),
        'B1': dict(num_blocks=many, widths=(2, 2, 2, 4)),
        'B2': dict(num_blocks=many, widths=(2.5, 2.5, 2.5, 5)),
        'B3': dict(num_blocks=many, widths=(3, 3, 3, 5)),
        'D2se': dict(num_blocks=most, widths=(2.5, 2.5, 2.5, 5), use_se=True),
    }
    for name in ('B1', 'B2', 'B3'):
        for groups in (2, 4):
            table[f'{name}g{groups}'] = dict(table[name], groups=groups)
    return table


@MODELS.register_module()
class OREPARepVGG(StagedBackbone):
    """RepVGG with OREPA, plain, or any other kind of 3×3 branches.

    Every block, also the stem, computes ``y = ReLU(BN(OREPA 3×3 (x)) +
    BN(conv 1×1 (x)) [+ BN(x)])``. Deployed, it is one 3×3 conv with bias and a ReLU.

    For arguments that are not listed, see :class:`OREPAResNet`.

    Args:
        arch (str | dict): A0, A1, A2, B0, B1, B1g2, B1g4, B2, B2g2, B2g4, B3, B3g2,
            B3g4 or D2se. Or a dict with ``num_blocks`` and ``widths`` (multipliers of
            64, 128, 256, 512 channels), with one value for each stage, and optionally
            ``groups`` (of every second block) and ``use_se``.
        block (str): ``'orepa'`` (here: ``'orepa_repvgg'``), ``'repvgg'``, or a name in
            :data:`mmorepa.layers.BLOCKS`. Defaults to ``'orepa'``.
        base_channels (int): Channels of the first stage at width 1. Defaults to 64.
        strides (Sequence[int]): Stride of each stage. Defaults to (2, 2, 2, 2).

    Raises:
        ValueError: If an argument has no meaning for this network.
    """

    ARCHITECTURES = _architectures()

    def __init__(
        self,
        arch: Union[str, dict],
        block: str = 'orepa',
        stem_block: Optional[str] = None,
        in_channels: int = 3,
        base_channels: int = 64,
        strides: Sequence[int] = (2, 2, 2, 2),
        with_cp: bool = False,
        **options,
    ) -> None:
        # In this network, 'orepa' means a RepVGG block with an OREPA branch.
        names = {'orepa': 'orepa_repvgg'}
        super().__init__(
            names.get(block, block),
            stem_block=names.get(stem_block, stem_block),
            strides=strides,
            **options,
        )
        arch = self._architecture(arch)
        make_block = partial(
            RepVGGBlock, use_se=arch.get('use_se', False), with_cp=with_cp
        )
        widths = [
            scaled_channels(base_channels * 2**i, width, f'stage {i + 1}')
            for i, width in enumerate(arch['widths'])
        ]
        channels = min(base_channels, widths[0])
        self.stem = make_block(in_channels, channels, stride=2, **self.stem_options)
        # Every second block of the network is grouped.
        groups = itertools.cycle([1, arch.get('groups', 1)])
        for i in range(self.num_stages):
            blocks = []
            for j in range(arch['num_blocks'][i]):
                blocks.append(
                    make_block(
                        channels,
                        widths[i],
                        stride=strides[i] if j == 0 else 1,
                        dilation=self.dilations[i],
                        groups=next(groups),
                        **self.conv_options,
                    )
                )
                channels = widths[i]
            self.add_stage(*blocks)
        self.feat_dim = channels
        self.freeze_stages()

    def plain_name(self, name: str, names: Collection[str]) -> str:
        return repvgg_name(name)

    def _architecture(self, arch: Union[str, dict]) -> dict:
        if isinstance(arch, str):
            if arch not in self.ARCHITECTURES:
                raise ValueError(
                    f'unknown arch {arch!r} of OREPARepVGG; choose one of '
                    f'{", ".join(self.ARCHITECTURES)}, or give a dict'
                )
            return self.ARCHITECTURES[arch]
        needed, known = {'num_blocks', 'widths'}, {'groups', 'use_se'}
        if not isinstance(arch, dict) or not needed <= arch.keys() <= needed | known:
            raise ValueError(
                f'arch is a name, or a dict of {", ".join(sorted(needed))} and maybe '
                f'{", ".join(sorted(known))}, found {arch}'
            )
        if min(len(arch[key]) for key in needed) < self.num_stages:
            raise ValueError(
                'num_blocks and widths of arch need a value for each of the '
                f'{self.num_stages} stages, found {arch}'
            )
        return dict(arch)
