"""ResNets whose convs are re-parameterised."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Optional

import numpy as np
import torch.utils.checkpoint as cp
from mmcv.cnn import build_activation_layer, build_plugin_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import ReparamConv2d
from .plain_names import resnet_name
from .staged_backbone import StagedBackbone, build_same_conv, scaled_channels


class _ResidualBlock(BaseModule):
    """``act(drop_path(branch(x)) + shortcut(x))``. Subclasses describe the branch.

    ``out_channels`` are ``expansion`` times the width of the branch. ``plugins`` are
    the plugins of this block alone. For all other arguments, see
    :class:`OREPAResNet`; they are for one block.
    """

    expansion: int
    # Block type of the projection; None means that of the convs.
    shortcut_block: Optional[str] = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
        style: str = 'pytorch',
        avg_down: bool = False,
        plugins: Sequence[dict] = (),
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        **options,
    ) -> None:
        super().__init__()
        if style not in ('pytorch', 'caffe'):
            raise ValueError(f"style is 'pytorch' or 'caffe', found {style!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.dilation = dilation
        self.groups = groups
        self.style = style
        self.with_cp = with_cp
        built = self.build_convs(width_per_group, **options)
        convs = {f'conv{i}': conv for i, conv in enumerate(built, 1)}
        parts: list[tuple[str, nn.Module]] = []
        for name, conv in convs.items():
            parts.append((name, conv))
            for plugin in plugins:
                if plugin['position'] == f'after_{name}':
                    cfg = dict(plugin['cfg'])
                    postfix = cfg.pop('postfix', '')
                    # These names are mmdet's, so that its checkpoints fit.
                    parts.append(
                        build_plugin_layer(cfg, postfix, in_channels=conv.out_channels)
                    )
        if len(parts) < len(convs) + len(plugins):
            raise ValueError(
                'the position of a plugin of this block is one of '
                f'{", ".join(f"after_{name}" for name in convs)}, found {plugins}'
            )
        # The names of the modules of the branch, in order.
        self.path = [name for name, _ in parts]
        if len({*self.path}) < len(parts):
            raise ValueError(
                f'give plugins of one type a postfix in their cfg, found {plugins}'
            )
        for name, part in parts:
            self.add_module(name, part)
        self.plugin_names = [name for name in self.path if name not in convs]
        self.last_conv_name = list(convs)[-1]
        self.downsample: Optional[nn.Module] = None
        if stride != 1 or in_channels != out_channels:
            pools = avg_down and stride != 1
            options['block'] = self.shortcut_block or options['block']
            geometry = in_channels, out_channels, 1, 1 if pools else stride
            self.downsample = build_same_conv(*geometry, has_act=False, **options)
            if pools:
                pool = nn.AvgPool2d(
                    stride, stride, ceil_mode=True, count_include_pad=False
                )
                self.downsample = nn.Sequential(
                    OrderedDict(pool=pool, conv=self.downsample)
                )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.act = build_activation_layer(options['act_cfg'])

    def build_convs(self, width_per_group: int, **options) -> list[ReparamConv2d]:
        """Makes the convs of the branch."""
        raise NotImplementedError

    @property
    def last_conv(self) -> ReparamConv2d:
        """The last conv of the branch."""
        return getattr(self, self.last_conv_name)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C', H/stride, W/stride)."""
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for name in self.path:
            x = getattr(self, name)(x)
        return self.act(self.drop_path(x) + shortcut)


class BasicBlock(_ResidualBlock):
    """Two 3×3 convs (ResNet-18 and 34)."""

    expansion = 1
    shortcut_block = 'plain'  # As in the paper's OREPA networks.

    def build_convs(self, width_per_group: int, **options) -> list[ReparamConv2d]:
        if self.groups != 1 or width_per_group != 64:
            raise ValueError(
                'depth 18 and 34 have no grouped form: groups and width_per_group '
                f'need a bottleneck (depth 50 and more), found groups={self.groups}, '
                f'width_per_group={width_per_group}'
            )
        width = self.out_channels
        return [
            build_same_conv(
                self.in_channels, width, 3, self.stride, self.dilation, **options
            ),
            build_same_conv(width, width, 3, has_act=False, **options),
        ]


class Bottleneck(_ResidualBlock):
    """1×1, 3×3 and 1×1 convs (ResNet-50, -101, -152, ResNeXt)."""

    expansion = 4

    def build_convs(self, width_per_group: int, **options) -> list[ReparamConv2d]:
        channels = self.out_channels // self.expansion
        width = channels * width_per_group // 64 * self.groups
        if width < 1:
            raise ValueError(
                f'width_per_group={width_per_group} leaves no channel for a group of '
                f'a stage of {channels} channels; it counts those of a stage of 64'
            )
        strides = (self.stride, 1) if self.style == 'caffe' else (1, self.stride)
        grouped = dict(options, groups=self.groups)
        return [
            build_same_conv(self.in_channels, width, 1, strides[0], **options),
            build_same_conv(width, width, 3, strides[1], self.dilation, **grouped),
            build_same_conv(width, self.out_channels, 1, has_act=False, **options),
        ]


@MODELS.register_module()
class OREPAResNet(StagedBackbone):
    """ResNet and ResNeXt of OREPA convs, or of any other block type.

    With ``block='orepa'``, all 3×3 convs, the 1×1 convs of bottlenecks and the 7×7 stem
    (in its deep linear form) are OREPA convs, as in the paper. The projection shortcut
    of basic blocks is plain. Each conv contains its BatchNorm, so the deployed network
    consists of plain convs with bias and of ReLUs.

    Arguments have the names of the toolboxes, but some defaults differ. In the
    toolboxes, ``zero_init_residual`` is True (mmpretrain, mmdet, mmseg), ``norm_eval``
    is True (mmdet), ``out_indices`` is (3,) (mmpretrain), and ``stem_channels`` is 64
    for any ``base_channels`` (mmpretrain, mmseg). ``frozen_stages`` is -1 in all of
    them, but configs of detectors set 1.

    Args:
        depth (int): 18, 34, 50, 101 or 152.
        block (str): A name in :data:`mmorepa.layers.BLOCKS`: ``'orepa'``, ``'dbb'`` or
            ``'plain'``, the plain ResNet. Defaults to ``'orepa'``.
        block_cfg (dict, optional): Arguments for convs of the block type, such as
            ``branches`` or ``single_init``. Defaults to None.
        stem_block (str, optional): Block type of the stem alone. For example,
            ``block='plain', stem_block='orepa'`` gives a plain ResNet with a deep
            linear stem. Defaults to None, the same as ``block``.
        stem_block_cfg (dict, optional): As ``block_cfg``, for a ``stem_block``.
            Defaults to None.
        in_channels (int): Channels of the image. Defaults to 3.
        stem_channels (int, optional): Defaults to None, ``base_channels``.
        base_channels (int): Width of the first stage, before expansion. Defaults to 64.
        width_mult (float): Multiplies every width; 1.5 and 2 give the paper's wide
            ResNet-18. Defaults to 1.0.
        groups (int): Groups of the bottlenecks' 3×3 conv. Defaults to 1.
        width_per_group (int): Channels of a group if ``base_channels`` is 64;
            ``groups=32, width_per_group=4`` gives ResNeXt 32×4d. Defaults to 64.
        num_stages (int): Stages to build, 1 to 4. Defaults to 4.
        strides (Sequence[int]): Stride of each stage. Defaults to (1, 2, 2, 2).
        dilations (Sequence[int]): Dilation of each stage. Defaults to (1, 1, 1, 1).
        contract_dilation (bool): The first block of a dilated stage has half its
            dilation. Defaults to False.
        multi_grid (Sequence[int], optional): Dilation of each block of the last stage.
            Defaults to None.
        out_indices (Sequence[int]): Stages to return. Defaults to (0, 1, 2, 3).
        style (str): The conv of a bottleneck that has the stride: ``'pytorch'`` for the
            3×3 conv, ``'caffe'`` for the first 1×1 conv, as in checkpoints of caffe and
            detectron. Defaults to ``'pytorch'``.
        deep_stem (bool): Whether the stem has three 3×3 convs, the first two with half
            the width, instead of a 7×7 conv (ResNet-C, ResNet-D). Defaults to False.
        avg_down (bool): Whether strided shortcuts are an average pooling and a 1×1 conv
            without a stride (ResNet-D). Defaults to False.
        frozen_stages (int): 0 freezes the stem, n also freezes the first n stages: they
            have no gradient, and BatchNorm in eval mode. Defaults to -1, nothing.
        norm_cfg (dict): Defaults to ``dict(type='BN', requires_grad=True)``.
        norm_eval (bool): Whether BatchNorm stays in eval mode. Defaults to False.
        act_cfg (dict): Defaults to ``dict(type='ReLU', inplace=True)``.
        plugins (Sequence[dict], optional): As in mmdet's ResNet: ``cfg`` of the layer,
            ``position`` (``'after_conv1'``, …) and optionally ``stages``, a bool for
            each stage. The deployed form keeps plugins. Defaults to None.
        drop_path_rate (float): The probability that a sample skips the branch of the
            last block in training. It grows linearly from 0 in the first block.
            Defaults to 0.
        with_cp (bool): Whether to save memory by computing each block again in the
            backward pass. Defaults to False.
        zero_init_residual (bool): Whether the last BatchNorm of each block starts at
            zero. Defaults to False.
        deploy (bool): Builds the deployed form. Loading folds checkpoints of the
            training form. Defaults to False.
        init_cfg (dict | list[dict], optional): ``dict(type='Pretrained',
            checkpoint=...)`` loads the checkpoint of a backbone or of a whole model,
            also of a plain ResNet (torchvision, timm, OpenMMLab). Defaults to None,
            the initialisation of each block.

    Raises:
        ValueError: If an argument has no meaning for this network.

    Examples:
        >>> from mmengine.registry import MODELS
        >>> net = MODELS.build(dict(type='OREPAResNet', depth=50))
        >>> [tuple(y.shape) for y in net(torch.rand(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8), (1, 1024, 4, 4), (1, 2048, 2, 2)]
    """

    ARCHITECTURES = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }

    def __init__(
        self,
        depth: int,
        block: str = 'orepa',
        in_channels: int = 3,
        stem_channels: Optional[int] = None,
        base_channels: int = 64,
        width_mult: float = 1.0,
        groups: int = 1,
        width_per_group: int = 64,
        strides: Sequence[int] = (1, 2, 2, 2),
        contract_dilation: bool = False,
        multi_grid: Optional[Sequence[int]] = None,
        style: str = 'pytorch',
        deep_stem: bool = False,
        avg_down: bool = False,
        plugins: Optional[Sequence[dict]] = None,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        zero_init_residual: bool = False,
        **options,
    ) -> None:
        super().__init__(block, strides=strides, **options)
        if depth not in self.ARCHITECTURES:
            raise ValueError(
                f'unknown depth {depth!r} of OREPAResNet; choose one of '
                f'{", ".join(map(str, self.ARCHITECTURES))}'
            )
        residual_block, depths = self.ARCHITECTURES[depth]
        if not 0 <= drop_path_rate < 1:
            raise ValueError(
                f'drop_path_rate is a probability below 1, found {drop_path_rate}'
            )
        last = self.num_stages - 1
        if multi_grid is not None and len(multi_grid) != depths[last]:
            raise ValueError(
                f'multi_grid gives the dilation of each of the {depths[last]} blocks '
                f'of the last stage, found {multi_grid}'
            )
        self.depth = depth
        self.style = style
        self.zero_init_residual = zero_init_residual
        stem_channels = scaled_channels(
            base_channels if stem_channels is None else stem_channels,
            width_mult,
            f'the stem (base_channels={base_channels} and width_mult={width_mult})',
        )
        base_channels = scaled_channels(base_channels, width_mult, 'the first stage')
        stem_conv = partial(build_same_conv, **self.stem_options)
        if deep_stem:
            half = scaled_channels(stem_channels, 0.5, 'a deep stem')
            convs = dict(
                conv1=stem_conv(in_channels, half, 3, 2),
                conv2=stem_conv(half, half, 3),
                conv3=stem_conv(half, stem_channels, 3),
            )
            self.stem = nn.Sequential(OrderedDict(convs))
        else:
            self.stem = stem_conv(in_channels, stem_channels, 7, 2)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        drop_path_rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        channels = stem_channels
        for i in range(self.num_stages):
            out_channels = base_channels * 2**i * residual_block.expansion
            grid = [self.dilations[i]] * depths[i]
            if contract_dilation and grid[0] > 1:
                grid[0] //= 2
            if multi_grid is not None and i == last:
                grid = multi_grid
            here = [plugin for plugin in plugins or () if self._has(i, **plugin)]
            blocks = []
            for j, dilation in enumerate(grid):
                blocks.append(
                    residual_block(
                        channels,
                        out_channels,
                        stride=strides[i] if j == 0 else 1,
                        dilation=dilation,
                        groups=groups,
                        width_per_group=width_per_group,
                        style=style,
                        avg_down=avg_down,
                        plugins=here,
                        drop_path_rate=next(drop_path_rates),
                        with_cp=with_cp,
                        **self.conv_options,
                    )
                )
                channels = out_channels
            self.add_stage(*blocks)
        self.feat_dim = channels
        self.freeze_stages()

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.stem(x))

    def init_weights(self) -> None:
        """Initialises as ``init_cfg`` says, after the blocks initialised themselves."""
        if self.zero_init_residual:
            for stage in self.stages:
                for block in stage:
                    # A deployed conv has no norms, so nothing is set.
                    for norm in block.last_conv.last_norms:
                        nn.init.zeros_(norm.weight)
        super().init_weights()

    def plain_name(self, name: str, names: Collection[str]) -> str:
        return resnet_name(self, name, names)

    def _has(
        self,
        stage: int,
        cfg: dict,
        position: str,
        stages: Optional[Sequence[bool]] = None,
    ) -> bool:
        """Whether a stage has the plugin that the other arguments describe."""
        if stages is not None and len(stages) != self.num_stages:
            raise ValueError(
                f'stages of a plugin is a bool for each of the {self.num_stages} '
                f'stages, found {tuple(stages)}'
            )
        return stages is None or stages[stage]
