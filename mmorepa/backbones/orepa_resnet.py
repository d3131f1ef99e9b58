"""ResNets whose convs are re-parameterised."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import numpy as np
import torch.utils.checkpoint as cp
from mmcv.cnn import build_activation_layer, build_plugin_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import ReparamConv2d, build_conv
from .staged_backbone import StagedBackbone, options_of_stem, scaled_channels

_NORM_CFG = dict(type='BN', requires_grad=True)
_ACT_CFG = dict(type='ReLU', inplace=True)


class _Conv(NamedTuple):
    """The options of one conv; all others are common to the network."""

    channels: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    has_act: bool = True


def _build_convs(
    in_channels: int, *convs: _Conv, act_cfg: dict, **options
) -> dict[str, ReparamConv2d]:
    """Builds ``conv1``, ``conv2``, …, each for the outputs of the one before."""
    built = {}
    for i, conv in enumerate(convs, 1):
        built[f'conv{i}'] = build_conv(
            in_channels=in_channels,
            out_channels=conv.channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.dilation * (conv.kernel_size // 2),
            dilation=conv.dilation,
            groups=conv.groups,
            bias=False,
            act_cfg=act_cfg if conv.has_act else None,
            **options,
        )
        in_channels = conv.channels
    return built


class _ResidualBlock(BaseModule):
    """``act(drop_path(branch(x)) + shortcut(x))``; subclasses describe the branch.

    ``out_channels`` are ``expansion`` times the width of the branch, and ``plugins``
    those of this block. All other arguments are those of :class:`OREPAResNet`, for one
    block.
    """

    expansion: int
    # Basic blocks keep a plain projection, also in the paper's OREPA networks.
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
        if out_channels % self.expansion:
            raise ValueError(
                f'out_channels is a multiple of the expansion, {self.expansion}, '
                f'found {out_channels}'
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.dilation = dilation
        self.groups = groups
        self.style = style
        self.with_cp = with_cp
        described = self.describe(out_channels // self.expansion, width_per_group)
        self.mid_channels = described[0].channels
        defaults = dict(block='orepa', norm_cfg=_NORM_CFG, act_cfg=_ACT_CFG)
        options = {**defaults, **options}
        convs = _build_convs(in_channels, *described, **options)
        # What the branch is made of, in order.
        self.path: list[str] = []
        for name, conv in convs.items():
            self._append(name, conv)
            for plugin in plugins:
                if plugin['position'] == f'after_{name}':
                    cfg = dict(plugin['cfg'])
                    postfix = cfg.pop('postfix', '')
                    # Named as in mmdet's ResNet, whose checkpoints fit.
                    self._append(
                        *build_plugin_layer(cfg, postfix, in_channels=conv.out_channels)
                    )
        positions = [f'after_{name}' for name in convs]
        for plugin in plugins:
            if plugin['position'] not in positions:
                raise ValueError(
                    'the position of a plugin of this block is one of '
                    f'{", ".join(positions)}, found {plugin["position"]!r}'
                )
        self.plugin_names = [name for name in self.path if name not in convs]
        self.last_conv_name = list(convs)[-1]
        self.downsample: Optional[nn.Module] = None
        if stride != 1 or in_channels != out_channels:
            pools = avg_down and stride != 1
            projection = _Conv(out_channels, 1, 1 if pools else stride, has_act=False)
            options['block'] = self.shortcut_block or options['block']
            self.downsample = _build_convs(in_channels, projection, **options)['conv1']
            if pools:
                pool = nn.AvgPool2d(
                    stride, stride, ceil_mode=True, count_include_pad=False
                )
                self.downsample = nn.Sequential(
                    OrderedDict(pool=pool, conv=self.downsample)
                )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.act = build_activation_layer(options['act_cfg'])

    def describe(self, channels: int, width_per_group: int) -> list[_Conv]:
        """The convs of a branch of this width (that without groups)."""
        raise NotImplementedError

    @property
    def last_conv(self) -> ReparamConv2d:
        """The last conv of the branch."""
        return getattr(self, self.last_conv_name)

    def _append(self, name: str, module: nn.Module) -> None:
        if hasattr(self, name):
            raise ValueError(
                f'a block has one {name}: give each plugin of this type a postfix in '
                'its cfg'
            )
        self.add_module(name, module)
        self.path.append(name)

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
    shortcut_block = 'plain'

    def describe(self, channels: int, width_per_group: int) -> list[_Conv]:
        if self.groups != 1 or width_per_group != 64:
            raise ValueError(
                'depth 18 and 34 have no grouped form: groups and width_per_group '
                f'need a bottleneck (depth 50 and more), found groups={self.groups}, '
                f'width_per_group={width_per_group}'
            )
        return [
            _Conv(channels, 3, self.stride, self.dilation),
            _Conv(channels, 3, has_act=False),
        ]


class Bottleneck(_ResidualBlock):
    """1×1, 3×3, 1×1 (ResNet-50 and deeper, ResNeXt); ``style`` places the stride."""

    expansion = 4

    def describe(self, channels: int, width_per_group: int) -> list[_Conv]:
        width = channels * width_per_group // 64 * self.groups
        if width < 1:
            raise ValueError(
                f'width_per_group={width_per_group} leaves no channel for a group of '
                f'a stage of {channels} channels; it counts those of a stage of 64'
            )
        strides = (self.stride, 1) if self.style == 'caffe' else (1, self.stride)
        return [
            _Conv(width, 1, strides[0]),
            _Conv(width, 3, strides[1], self.dilation, self.groups),
            _Conv(self.out_channels, 1, has_act=False),
        ]


@MODELS.register_module()
class OREPAResNet(StagedBackbone):
    """ResNet and ResNeXt of OREPA convs, or of any other block type.

    With ``block='orepa'`` all 3×3 convs, the 1×1 convs of bottlenecks and the 7×7 stem
    (in its deep linear form) are OREPA convs, as in the paper's networks; the
    projection shortcut of basic blocks is plain. Each conv holds its BatchNorm, so that
    the deployed network is plain convs with bias, and ReLUs.

    Arguments are called as in the toolboxes. Some defaults are not theirs:
    ``zero_init_residual`` is True in mmpretrain, mmdet and mmseg, ``norm_eval`` True in
    mmdet, ``out_indices`` (3,) in mmpretrain, and ``stem_channels`` 64 in mmpretrain
    and mmseg whatever ``base_channels``. ``frozen_stages`` is -1 everywhere; the stock
    detectors set 1.

    Args:
        depth (int): 18, 34, 50, 101 or 152.
        block (str): A name in :data:`mmorepa.layers.BLOCKS`: ``'orepa'``, ``'dbb'`` or
            ``'plain'``, the plain ResNet. Defaults to ``'orepa'``.
        block_cfg (dict, optional): Arguments of the block type's convs, such as
            ``branches`` or ``single_init``. Defaults to None.
        stem_block (str, optional): Block type of the stem alone: ``block='plain',
            stem_block='orepa'`` is a plain ResNet with a deep linear stem. Defaults to
            None, as ``block``.
        stem_block_cfg (dict, optional): As ``block_cfg``, for a ``stem_block``.
            Defaults to None.
        in_channels (int): Channels of the image. Defaults to 3.
        stem_channels (int, optional): Defaults to None, ``base_channels``.
        base_channels (int): Of the first stage, before expansion. Defaults to 64.
        width_mult (float): Multiplies every width; 1.5 and 2 give the paper's wide
            ResNet-18. Defaults to 1.0.
        groups (int): Groups of the bottlenecks' 3×3 conv. Defaults to 1.
        width_per_group (int): Channels of a group where ``base_channels`` is 64;
            ``groups=32, width_per_group=4`` gives ResNeXt 32×4d. Defaults to 64.
        num_stages (int): Stages to build, 1 to 4. Defaults to 4.
        strides (Sequence[int]): Of the first blocks. Defaults to (1, 2, 2, 2).
        dilations (Sequence[int]): Of each stage. Defaults to (1, 1, 1, 1).
        contract_dilation (bool): The first block of a dilated stage has half its
            dilation. Defaults to False.
        multi_grid (Sequence[int], optional): Dilation of each block of the last stage.
            Defaults to None.
        out_indices (Sequence[int]): Stages to return. Defaults to (0, 1, 2, 3).
        style (str): ``'pytorch'`` for the stride of a bottleneck on the 3×3 conv,
            ``'caffe'`` for that on the first 1×1 conv, which checkpoints of caffe and
            detectron need. Defaults to ``'pytorch'``.
        deep_stem (bool): Three 3×3 convs of the block type in place of the 7×7 one, the
            first two of half the width (ResNet-C, ResNet-D). Defaults to False.
        avg_down (bool): Shortcuts with a stride pool by averaging, and project by a 1×1
            conv without a stride (ResNet-D). Defaults to False.
        frozen_stages (int): 0 freezes the stem, n the stages up to the n-th as well: no
            gradient and BatchNorm in eval mode. Defaults to -1, nothing.
        norm_cfg (dict): Defaults to ``dict(type='BN', requires_grad=True)``.
        norm_eval (bool): BatchNorm stays in eval mode. Defaults to False.
        act_cfg (dict): Defaults to ``dict(type='ReLU', inplace=True)``.
        plugins (Sequence[dict], optional): As for mmdet's ResNet: ``cfg`` of the layer,
            ``position`` (``'after_conv1'``, …) and optionally ``stages``, a bool for
            each. They stay in the deployed form. Defaults to None.
        drop_path_rate (float): The probability that a sample goes without the branch of
            the last block while training; it grows linearly from 0 in the first.
            Defaults to 0.
        with_cp (bool): Saves memory by computing each block again in the backward pass.
            Defaults to False.
        zero_init_residual (bool): The last BatchNorm of each block starts at zero.
            Defaults to False.
        deploy (bool): Builds the deployed form. Checkpoints of the training form are
            folded as they are loaded. Defaults to False.
        init_cfg (dict | list[dict], optional): ``dict(type='Pretrained',
            checkpoint=...)`` loads the checkpoint of a backbone or of a whole model,
            also of a plain ResNet (torchvision, timm, OpenMMLab). Defaults to None,
            each block's own initialisation.

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
        block_cfg: Optional[dict] = None,
        stem_block: Optional[str] = None,
        stem_block_cfg: Optional[dict] = None,
        in_channels: int = 3,
        stem_channels: Optional[int] = None,
        base_channels: int = 64,
        width_mult: float = 1.0,
        groups: int = 1,
        width_per_group: int = 64,
        num_stages: int = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        contract_dilation: bool = False,
        multi_grid: Optional[Sequence[int]] = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        style: str = 'pytorch',
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: int = -1,
        norm_cfg: Optional[dict] = None,
        norm_eval: bool = False,
        act_cfg: Optional[dict] = None,
        plugins: Optional[Sequence[dict]] = None,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        zero_init_residual: bool = False,
        deploy: bool = False,
        init_cfg: Union[dict, list[dict], None] = None,
    ) -> None:
        stages = num_stages, strides, dilations, out_indices
        super().__init__(*stages, frozen_stages, norm_eval, init_cfg)
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
        if multi_grid is not None and len(multi_grid) != depths[num_stages - 1]:
            raise ValueError(
                f'multi_grid gives the dilation of each of the '
                f'{depths[num_stages - 1]} blocks of the last stage, found {multi_grid}'
            )
        self.depth = depth
        self.style = style
        self.zero_init_residual = zero_init_residual
        options = dict(
            block=block,
            block_cfg=block_cfg,
            norm_cfg=norm_cfg or _NORM_CFG,
            act_cfg=act_cfg or _ACT_CFG,
            deploy=deploy,
        )
        stem_options = options_of_stem(options, stem_block, stem_block_cfg)
        stem_channels = scaled_channels(
            base_channels if stem_channels is None else stem_channels,
            width_mult,
            f'the stem (base_channels={base_channels} and width_mult={width_mult})',
        )
        base_channels = scaled_channels(base_channels, width_mult, 'the first stage')
        if deep_stem:
            half = scaled_channels(stem_channels, 0.5, 'a deep stem')
            convs = _Conv(half, 3, 2), _Conv(half, 3), _Conv(stem_channels, 3)
            convs = _build_convs(in_channels, *convs, **stem_options)
            self.stem = nn.Sequential(OrderedDict(convs))
        else:
            conv = _Conv(stem_channels, 7, 2)
            (self.stem,) = _build_convs(in_channels, conv, **stem_options).values()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        drop_path_rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        channels = stem_channels
        for i in range(num_stages):
            grid = multi_grid if i == num_stages - 1 else None
            out_channels = base_channels * 2**i * residual_block.expansion
            blocks = []
            first = dilations[i]
            if contract_dilation and first > 1:
                first //= 2
            rest = [dilations[i]] * (depths[i] - 1)
            for j, dilation in enumerate(grid or [first, *rest]):
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
                        plugins=_plugins_of_stage(plugins or (), i, num_stages),
                        drop_path_rate=next(drop_path_rates),
                        with_cp=with_cp,
                        **options,
                    )
                )
                channels = out_channels
            self.add_stage(*blocks)
        self.feat_dim = channels
        self.freeze_stages()

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.stem(x))

    def init_weights(self) -> None:
        """Initialises as ``init_cfg`` says; blocks have initialised themselves."""
        if self.zero_init_residual:
            for stage in self.stages:
                for block in stage:
                    # Deployed, the norms are gone and so is the choice.
                    for norm in block.last_conv.last_norms:
                        nn.init.zeros_(norm.weight)
        super().init_weights()


def _plugins_of_stage(
    plugins: Sequence[dict], stage: int, num_stages: int
) -> list[dict]:
    """The plugins of one stage, each with its ``cfg`` and ``position``."""
    chosen = []
    for plugin in plugins:
        if not {'cfg', 'position'} <= plugin.keys() <= {'cfg', 'position', 'stages'}:
            raise ValueError(
                'a plugin has cfg, position and, if it is not for every stage, stages; '
                f'found {", ".join(plugin)}'
            )
        stages = plugin.get('stages') or (True,) * num_stages
        if len(stages) != num_stages:
            raise ValueError(
                f'stages of a plugin is a bool for each of the {num_stages} stages, '
                f'found {tuple(stages)}'
            )
        if stages[stage]:
            chosen.append(plugin)
    return chosen
