"""The Diverse Branch Block (Ding et al., CVPR 2021), the baseline in OREPA's paper."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import (
    average_kernel,
    cached_constant,
    compose_1x1_kxk,
    constant_response,
    filtered_kernel,
    identity_1x1,
)
from .blocks import BLOCKS
from .conv import ReparamConv2d, leaf_call
from .folding import norm_scale
from .multi_branch import MultiBranchConv2d


@BLOCKS.register_module('dbb')
class DBBConv2d(MultiBranchConv2d):
    """Four branches, each with BatchNorm, that run on the feature map.

    - ``origin``: k×k conv
    - ``pointwise``: 1×1 conv
    - ``average``: 1×1 conv, BatchNorm, k×k average pooling
    - ``pointwise_kxk``: 1×1 conv (initially the identity), BatchNorm, k×k conv

    Takes the arguments of :class:`MultiBranchConv2d`.
    """

    BRANCH_NAMES = ('origin', 'pointwise', 'average', 'pointwise_kxk')

    def build_branch(self, name: str) -> nn.Module:
        inputs, outputs = self.in_channels, self.out_channels
        if name == 'origin':
            return self.build_conv()
        if name == 'pointwise':
            return self.build_conv(kernel_size=1)
        if name == 'average':
            first = self.build_conv(kernel_size=1, stride=1)
            second = self.build_conv(
                AverageConv2d, in_channels=outputs, groups=outputs, padding=0
            )
        else:
            first = self.build_conv(
                IdentityConv2d, out_channels=inputs, kernel_size=1, stride=1
            )
            second = self.build_conv(padding=0)
        return PointwiseThenConv2d(first, second)


class PointwiseThenConv2d(nn.Module):
    """A 1×1 conv with BatchNorm, padding, and a k×k conv with BatchNorm.

    The map between the two is padded with the output of the BatchNorm for zero. So the
    two fold exactly into one conv with a zero padding of dilation·(k // 2), also at the
    borders. ``second`` has the groups of ``first``, or is depthwise.
    """

    def __init__(self, first: ReparamConv2d, second: ReparamConv2d) -> None:
        super().__init__()
        self.first = first
        self.second = second

    @property
    def norm(self) -> nn.Module:
        """The last BatchNorm."""
        return self.second.norm

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, I, H, W) to (N, O, H', W')."""
        if isinstance(x, torch.fx.Proxy):
            return leaf_call(self, x)
        x = self.first(x)
        pads = [self.second.dilation[0] * (self.second.kernel_size[0] // 2)] * 4
        # Read the statistics after the conv, which has just updated them.
        value = _padding_value(self.first.norm).to(x.dtype)[:, None, None]
        border = F.pad(torch.zeros_like(x[:1, :1]), pads, value=1)
        return self.second(F.pad(x, pads) + border * value)

    def kernel(self) -> Tensor:
        """Both convs in one, (O, Ig, k, k), with a constant scale of the first norm."""
        scale = norm_scale(self.first.norm)
        first = self.first.kernel() * scale[:, None, None, None]
        return self._compose(first, self.second.kernel())

    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel, shape (O, Ig, k, k), and bias, shape (O,), in float64."""
        first, first_bias = self.first.equivalent_kernel_bias()
        second, second_bias = self.second.equivalent_kernel_bias()
        passed_on = constant_response(second, first_bias, self.second.groups)
        return self._compose(first, second), second_bias + passed_on

    def _compose(self, first: Tensor, second: Tensor) -> Tensor:
        if self.second.groups == self.first.groups:
            return compose_1x1_kxk(first, second, self.second.groups)
        return filtered_kernel(first, second[:, 0])


class IdentityConv2d(ReparamConv2d):
    """A 1×1 conv that learns the difference from the identity."""

    folds_online = False

    def build_branches(self) -> '_IdentityKernel':
        return _IdentityKernel(self.in_channels, self.groups)


class _IdentityKernel(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels // groups, 1, 1))

    def forward(self) -> Tensor:
        shape = self.weight.shape[:2]
        return self.weight + cached_constant(identity_1x1, *shape, like=self.weight)


class AverageConv2d(ReparamConv2d):
    """Average pooling as a depthwise conv, dilation included."""

    folds_online = False

    def build_branches(self) -> '_AverageKernel':
        return _AverageKernel(self.out_channels, self.kernel_size[0])

    def convolve(self, x: Tensor) -> Tensor:
        if self.dilation == (1, 1):  # Pooling is several times faster than a conv.
            return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding)
        return super().convolve(x)


class _AverageKernel(nn.Module):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        # forward() divides, so that the result is exact in the dtype of the fold.
        self.register_buffer('ones', torch.ones(channels, 1, 1, 1), persistent=False)

    def _apply(self, *args, **kwargs) -> '_AverageKernel':
        super()._apply(*args, **kwargs)
        self.ones.fill_(1)  # to_empty() does not write values.
        return self

    def forward(self) -> Tensor:
        return average_kernel(self.ones, self.kernel_size)


def _padding_value(norm: nn.Module) -> Tensor:
    """The output of a BatchNorm in eval mode for zeros, without a gradient."""
    value = -norm.running_mean * norm_scale(norm)
    return value + norm.bias.detach() if norm.affine else value
