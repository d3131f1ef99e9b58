"""RepVGG blocks (Ding et al., CVPR 2021), with a plain or an OREPA 3×3 branch."""

from typing import Optional

from mmcv.cnn import build_norm_layer
from torch import Tensor, nn

from ..functional import identity_1x1
from .blocks import BLOCKS
from .conv import ReparamConv2d
from .folding import fuse_norm
from .multi_branch import MultiBranchConv2d
from .orepa import OREPAConv2d, OREPAKernel


@BLOCKS.register_module('repvgg')
class RepVGGConv2d(MultiBranchConv2d):
    """``BN(conv k×k) + BN(conv 1×1) [+ BN(x)]``, the last term if shapes allow it.

    Takes the arguments of :class:`MultiBranchConv2d`.
    """

    BRANCH_NAMES = ('origin', 'pointwise', 'identity')

    def build_branch(self, name: str) -> Optional[nn.Module]:
        if name == 'origin':
            return self.build_origin()
        if name == 'pointwise':
            return self.build_conv(kernel_size=1)
        if self.in_channels != self.out_channels or self.stride != (1, 1):
            return None
        return IdentityBranch(self.out_channels, self.groups, self.norm_cfg)

    def build_origin(self) -> ReparamConv2d:
        """Makes the k×k branch."""
        return self.build_conv()


@BLOCKS.register_module('orepa_repvgg')
class OREPARepVGGConv2d(RepVGGConv2d):
    """A RepVGG block whose k×k branch is an OREPA conv, without a 1×1 branch."""

    def build_origin(self) -> OREPAConv2d:
        names = [name for name in OREPAKernel.INITIAL_SCALES if name != 'pointwise']
        return self.build_conv(OREPAConv2d, branches=names, kaiming_a=1.0)


class IdentityBranch(nn.Module):
    """BatchNorm of the input, as a branch."""

    def __init__(self, channels: int, groups: int, norm_cfg: dict) -> None:
        super().__init__()
        self.groups = groups
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.stride = (1, 1)
        self.fixed_geometry: dict = {}  # This branch follows the block in everything.

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape, or every stride-th pixel of it."""
        height, width = self.stride
        return self.norm(x if self.stride == (1, 1) else x[:, :, ::height, ::width])

    def kernel(self) -> None:
        """Returns None, because an identity has no weights."""

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel, shape (C, C/g, 1, 1), and bias, shape (C,), in float64."""
        channels = self.norm.num_features
        identity = identity_1x1(channels, channels // self.groups)
        kernel = identity.to(self.norm.running_mean.device).double()
        return fuse_norm(kernel, None, self.norm)
