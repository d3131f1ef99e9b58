"""ResNets whose convs are re-parameterised."""

from collections.abc import Sequence
from typing import Optional, Union

import torch.utils.checkpoint as cp
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import ReparamConv2d, build_conv
from .staged_backbone import StagedBackbone, scaled_channels


class _ResidualBlock(BaseModule):
    """``act(branch(x) + shortcut(x))``; subclasses make the branch.

    Args:
        in_channels (int): Channels of the input.
        channels (int): Width of the branch, before expansion.
        stride (int): Defaults to 1.
        dilation (int): Defaults to 1.
        groups (int): Groups of the 3×3 conv of a bottleneck. Defaults to 1.
        width_per_group (int): Width of a group for 64 channels. Defaults to 64.
        block (str): Block type of the convs. Defaults to ``'orepa'``.
        block_cfg (dict, optional): Their further arguments. Defaults to None.
        norm_cfg (dict): Normalisation of every conv.
        act_cfg (dict): Activation.
        with_cp (bool): Recomputes activations in the backward pass.
            Defaults to False.
        deploy (bool): Builds the deployed form. Defaults to False.
    """

    expansion: int
    # Basic blocks keep a plain projection, also in the paper's OREPA networks.
    shortcut_block: Optional[str] = None

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        width_per_group: int = 64,
        block: str = 'orepa',
        block_cfg: Optional[dict] = None,
        norm_cfg: Optional[dict] = None,
        act_cfg: Optional[dict] = None,
        with_cp: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.block = block
        self.conv_cfg = dict(
            bias=False, norm_cfg=norm_cfg, deploy=deploy, block_cfg=block_cfg
        )
        self.act_cfg = act_cfg
        out_channels = channels * self.expansion
        self.build_branch(
            in_channels,
            channels,
            out_channels,
            stride,
            dilation,
            groups,
            width_per_group,
        )
        self.downsample: Optional[ReparamConv2d] = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = build_conv(
                self.shortcut_block or block,
                in_channels,
                out_channels,
                1,
                stride=stride,
                **self.conv_cfg,
            )
        self.act = build_activation_layer(act_cfg)

    def build_branch(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        width_per_group: int,
    ) -> None:
        raise NotImplementedError

    @property
    def convs(self) -> list[ReparamConv2d]:
        """The convs of the branch, in order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C', H/stride, W/stride)."""
        if self.with_cp and x.requires_grad:
            return cp.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        for conv in self.convs:
            x = conv(x)
        return self.act(x + shortcut)


class BasicBlock(_ResidualBlock):
    """Two 3×3 convs (ResNet-18 and 34)."""

    expansion = 1
    shortcut_block = 'none'

    def build_branch(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        width_per_group: int,
    ) -> None:
        if groups != 1 or width_per_group != 64:
            raise ValueError(
                'depth 18 and 34 have no grouped form: groups and width_per_group '
                f'need a bottleneck (depth 50 and more), found groups={groups}, '
                f'width_per_group={width_per_group}'
            )
        self.conv1 = build_conv(
            self.block,
            in_channels,
            channels,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            act_cfg=self.act_cfg,
            **self.conv_cfg,
        )
        self.conv2 = build_conv(
            self.block, channels, out_channels, 3, padding=1, **self.conv_cfg
        )

    @property
    def convs(self) -> list[ReparamConv2d]:
        return [self.conv1, self.conv2]


class Bottleneck(_ResidualBlock):
    """1×1, 3×3 with the stride, 1×1 (ResNet-50 and deeper, ResNeXt)."""

    expansion = 4

    def build_branch(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        width_per_group: int,
    ) -> None:
        width = channels * width_per_group // 64 * groups
        if width < 1:
            raise ValueError(
                f'width_per_group={width_per_group} leaves no channel for a group of '
                f'a stage of {channels} channels; it counts those of a stage of 64'
            )
        self.conv1 = build_conv(
            self.block, in_channels, width, 1, act_cfg=self.act_cfg, **self.conv_cfg
        )
        self.conv2 = build_conv(
            self.block,
            width,
            width,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            act_cfg=self.act_cfg,
            **self.conv_cfg,
        )
        self.conv3 = build_conv(self.block, width, out_channels, 1, **self.conv_cfg)

    @property
    def convs(self) -> list[ReparamConv2d]:
        return [self.conv1, self.conv2, self.conv3]


@MODELS.register_module()
class OREPAResNet(StagedBackbone):
    """ResNet and ResNeXt of OREPA convs, or of any other block type.

    With ``block='orepa'`` all 3×3 convs, the 1×1 convs of bottlenecks and the
    7×7 stem (in its deep linear form) are OREPA convs, as in the paper's networks;
    the projection shortcut of basic blocks is plain. Each conv holds its
    BatchNorm, so that the deployed network is plain convs with bias, and ReLUs.

    Args:
        depth (int): 18, 34, 50, 101 or 152.
        block (str): Block type, a key of :data:`mmorepa.layers.BLOCKS`: ``'orepa'``,
            ``'dbb'`` or ``'none'``, the plain ResNet. Defaults to ``'orepa'``.
        block_cfg (dict, optional): Arguments of the block type's convs, such as
            ``branches`` or ``single_init``. Defaults to None.
        in_channels (int): Channels of the image. Defaults to 3.
        base_channels (int): Width of the stem and of the first stage, before
            expansion. Defaults to 64.
        width_mult (float): Multiplies every width, ``base_channels`` included; 1.5
            and 2 give the paper's wide ResNet-18. Defaults to 1.0.
        groups (int): Groups of the bottlenecks' 3×3 conv. Defaults to 1.
        width_per_group (int): Channels of a group where ``base_channels`` is 64;
            ``groups=32, width_per_group=4`` gives ResNeXt 32×4d. Defaults to 64.
        num_stages (int): Stages to build, 1 to 4. Defaults to 4.
        strides (Sequence[int]): Stride of the first block of each stage.
            Defaults to (1, 2, 2, 2).
        dilations (Sequence[int]): Dilation of each stage. Defaults to (1, 1, 1, 1).
        contract_dilation (bool): Whether the first block of a dilated stage has
            half its dilation. Defaults to False.
        multi_grid (Sequence[int], optional): Dilation of each block of the last
            stage. Defaults to None.
        out_indices (Sequence[int]): Stages whose output is returned.
            Defaults to (0, 1, 2, 3).
        style (str): Only ``'pytorch'``, the stride on the 3×3 conv.
        frozen_stages (int): 0 freezes the stem, n the stages up to the n-th as
            well: no gradient and BatchNorm in eval mode. Defaults to -1, nothing.
        norm_cfg (dict): Defaults to ``dict(type='BN', requires_grad=True)``.
        norm_eval (bool): Whether BatchNorm stays in eval mode while training.
            Defaults to False.
        act_cfg (dict): Defaults to ``dict(type='ReLU', inplace=True)``.
        with_cp (bool): Saves memory by computing each block again in the backward
            pass. Defaults to False.
        zero_init_residual (bool): Whether the last BatchNorm of each block starts
            at zero. Defaults to False.
        deploy (bool): Builds the deployed form. Checkpoints of the training form
            are folded as they are loaded. Defaults to False.
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
    # torchvision, timm and OpenMMLab.
    PLAIN_KEYS = (
        (r'conv1\.weight', r'stem.weight'),
        (r'bn1\.(\w+)', r'stem.norm.\1'),
        (r'(layer\d\.\d+)\.bn(\d)\.(\w+)', r'\1.conv\2.norm.\3'),
        (r'(layer\d\.\d+\.downsample)\.0\.(\w+)', r'\1.\2'),
        (r'(layer\d\.\d+\.downsample)\.1\.(\w+)', r'\1.norm.\2'),
    )

    def __init__(
        self,
        depth: int,
        block: str = 'orepa',
        block_cfg: Optional[dict] = None,
        in_channels: int = 3,
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
        frozen_stages: int = -1,
        norm_cfg: Optional[dict] = None,
        norm_eval: bool = False,
        act_cfg: Optional[dict] = None,
        with_cp: bool = False,
        zero_init_residual: bool = False,
        deploy: bool = False,
        init_cfg: Union[dict, list[dict], None] = None,
    ) -> None:
        super().__init__(
            num_stages,
            strides,
            dilations,
            out_indices,
            frozen_stages,
            norm_eval,
            init_cfg,
        )
        residual_block, depths = self._architecture(depth)
        if style != 'pytorch':
            raise ValueError(
                "OREPAResNet has the stride on the 3x3 conv, style='pytorch'; "
                f'found style={style!r}'
            )
        if multi_grid is not None and len(multi_grid) != depths[num_stages - 1]:
            raise ValueError(
                f'multi_grid gives the dilation of each of the '
                f'{depths[num_stages - 1]} blocks of the last stage, found {multi_grid}'
            )
        self.depth = depth
        self.zero_init_residual = zero_init_residual
        convs = dict(
            block=block,
            block_cfg=block_cfg,
            norm_cfg=norm_cfg or dict(type='BN', requires_grad=True),
            act_cfg=act_cfg or dict(type='ReLU', inplace=True),
            deploy=deploy,
        )
        stem = f'the stem (base_channels={base_channels} and width_mult={width_mult})'
        base_channels = scaled_channels(base_channels, width_mult, stem)
        self.stem = build_conv(
            in_channels=in_channels,
            out_channels=base_channels,
            kernel_size=7,
            stride=2,
            padding=3,
            bias=False,
            **convs,
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = base_channels
        for i in range(num_stages):
            width = base_channels * 2**i
            grid = multi_grid if i == num_stages - 1 else None
            blocks = []
            for j, dilation in enumerate(
                _block_dilations(depths[i], dilations[i], contract_dilation, grid)
            ):
                blocks.append(
                    residual_block(
                        channels,
                        width,
                        stride=strides[i] if j == 0 else 1,
                        dilation=dilation,
                        groups=groups,
                        width_per_group=width_per_group,
                        with_cp=with_cp,
                        **convs,
                    )
                )
                channels = width * residual_block.expansion
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
                    for norm in block.convs[-1].last_norms:
                        nn.init.zeros_(norm.weight)
        super().init_weights()

    @classmethod
    def _architecture(cls, depth: int) -> tuple[type[_ResidualBlock], tuple[int, ...]]:
        if depth not in cls.ARCHITECTURES:
            raise ValueError(
                f'unknown depth {depth!r} of OREPAResNet; choose one of '
                f'{", ".join(map(str, cls.ARCHITECTURES))}'
            )
        return cls.ARCHITECTURES[depth]


def _block_dilations(
    depth: int,
    dilation: int,
    contract_dilation: bool,
    multi_grid: Optional[Sequence[int]],
) -> list[int]:
    """The dilation of each block of a stage."""
    if multi_grid is not None:
        return list(multi_grid)
    first = dilation // 2 if contract_dilation and dilation > 1 else dilation
    return [first] + [dilation] * (depth - 1)
