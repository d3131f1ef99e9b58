"""Plain convs with the interface of all blocks: the baseline of every comparison."""

import torch
from torch import Tensor, nn

from .blocks import BLOCKS
from .conv import ReparamConv2d
from .starting import parameter_of


class PlainKernel(nn.Module):
    """A single kernel, (O, Ig, k, k), initialised as in OpenMMLab's ResNets."""

    def __init__(
        self, out_channels: int, in_channels_per_group: int, kernel_size: int
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels_per_group, kernel_size, kernel_size)
        )
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')

    def forward(self) -> Tensor:
        """Returns the kernel, shape (O, Ig, k, k)."""
        return self.weight

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        """Copies a kernel, shape (O, Ig, k, k), into this one."""
        parameter_of(self, 'weight').copy_(kernel)

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Multiplies the kernel by a factor, shape (O,), for each output channel."""
        self.weight.mul_(factor[:, None, None, None])


# 'none' is an older name of this block type.
@BLOCKS.register_module(['plain', 'none'])
class PlainConv2d(ReparamConv2d, nn.Conv2d):
    """Conv, normalisation, activation. Deployment folds only the BatchNorm."""

    folds_online = False

    def build_branches(self) -> PlainKernel:
        return PlainKernel(
            self.out_channels, self.in_channels // self.groups, self.kernel_size[0]
        )

    def kernel(self) -> Tensor:
        return self.weight if self.deployed else self.branches.weight
