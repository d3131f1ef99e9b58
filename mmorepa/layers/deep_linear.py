"""Large kernels that are composed of 3×3 kernels."""

import copy
import sys
from collections.abc import Callable

import torch
import torch.fx
from torch import Tensor, nn

from ..functional import compose_deep_linear, solve_deep_linear
from .blocks import BLOCKS
from .branch_kernel import BranchKernel
from .conv import ReparamConv2d
from .plain import PlainKernel

# A symbolic trace shows this as one node, like fold_kernel.
torch.fx.wrap('compose_deep_linear')

# The paper's networks use the deep linear form for this kernel size and larger ones.
DEEP_LINEAR_FROM = 7


class DeepLinearKernel(nn.Module):
    """A k×k kernel composed of (k−1)/2 kernels of 3×3 (paper, section 3.3).

    The first factor maps I to M channels, the next ones M to M, and the last one M to
    O. Beyond 7×7, or with groups, a fresh kernel is scaled like that of a plain conv.

    Args:
        build_factor (Callable): Takes the output and the input channels of a factor
            and returns a module whose ``forward()`` returns its kernel, shape
            (outputs, inputs / g, 3, 3).
        out_channels (int): O.
        in_channels (int): I.
        kernel_size (int): k, odd, at least 3.
        groups (int): g. Defaults to 1.
        inner_mult (float): M / O, rounded down to whole channels of a group.
            Defaults to 1.

    Raises:
        ValueError: If a group has no channel left.
    """

    def __init__(
        self,
        build_factor: Callable[[int, int], nn.Module],
        out_channels: int,
        in_channels: int,
        kernel_size: int,
        groups: int = 1,
        inner_mult: float = 1.0,
    ) -> None:
        super().__init__()
        self.groups = groups
        inner = int(out_channels // groups * inner_mult) * groups
        if inner < 1:
            raise ValueError(
                f'inner_mult={inner_mult} leaves no inner channel in a group of '
                f'{out_channels // groups} output channels'
            )
        widths = [in_channels, *[inner] * ((kernel_size - 3) // 2), out_channels]
        self.factors = nn.ModuleList(
            build_factor(outputs, inputs) for inputs, outputs in zip(widths, widths[1:])
        )
        # The paper's stem, 7×7 without groups, starts as published.
        if kernel_size > DEEP_LINEAR_FROM or groups > 1:
            self._normalize()

    @torch.no_grad()
    def _normalize(self) -> None:
        """Scales fresh factors alike, so that the kernel is as large as a plain one."""
        for factor in self.factors:
            factor.rescale(1 / factor().flatten(1).norm(dim=1).clamp_min(1e-12))
        # In a fresh torch.nn.Conv2d, the mean square norm of an output channel is 1/3.
        norm = self().flatten(1).norm(dim=1).clamp_min(1e-12)
        self.rescale(3**-0.5 / norm)

    def forward(self) -> Tensor:
        """Returns the kernel, shape (O, Ig, k, k)."""
        return _compose(self.factors, self.groups)

    @torch.no_grad()
    def set_kernel(self, kernel: Tensor) -> None:
        """Sets the last factor so that the chain composes to this kernel.

        Raises a ValueError if the other factors have too few channels for that.
        """
        *all_but_last, last = self.factors
        options = {}
        if all_but_last:
            options = self._shift()
            wide = copy.deepcopy(nn.ModuleList(all_but_last)).double()
            kernel = solve_deep_linear(kernel, _compose(wide, self.groups), self.groups)
        last.set_kernel(kernel, **options)

    def _shift(self) -> dict[str, float]:
        """Makes all factors but the last shift their input, and do nothing else.

        Each inner channel shifts one input channel by one offset. With all offsets, the
        3×3 kernels of the last factor reach every tap of the kernel. So the last factor
        holds the weights of the plain kernel and trains like them. The scales keep the
        other factors from moving much further. With too few inner channels, no factor
        is changed.

        Returns:
            dict[str, float]: The scale of ``origin`` in the last factor, if any.
        """
        *shifts, last = self.factors
        kernels = [torch.zeros_like(factor(), dtype=torch.float64) for factor in shifts]
        inputs, inner = kernels[0].shape[1], len(kernels[0]) // self.groups
        size = 2 * len(shifts)  # The largest offset.
        count = -(-(size + 3) // 3)
        offsets = [round(i * size / (count - 1)) for i in range(count)]
        units = [(i, h, w) for h in offsets for w in offsets for i in range(inputs)]
        if len(units) > inner:
            return {}
        # Count how many offsets reach each tap, in one dimension.
        taps = range(size + 3)
        reached = [sum(t - 2 <= offset <= t for offset in offsets) for t in taps]
        gain = sum(n * n for n in reached) / len(reached) * inner / len(units)
        for channel in range(inner * self.groups):
            i, *offset = units[channel % inner % len(units)]
            for place, kernel in enumerate(kernels):
                h, w = (min(2, max(0, whole - 2 * place)) for whole in offset)
                if place == 0:
                    kernel[channel, i, h, w] = 1
                else:  # compose_deep_linear() flips all kernels but the first.
                    kernel[channel, channel % inner, 2 - h, 2 - w] = 1
        has_scale = isinstance(last, BranchKernel)
        for factor, kernel in zip(shifts, kernels):
            if has_scale:
                factor.set_kernel(kernel, scale=0.2**0.5)
            else:
                factor.set_kernel(kernel * gain ** (-0.5 / len(shifts)))
        return dict(scale=gain**-0.5) if has_scale else {}

    def rescale(self, factor: Tensor) -> None:
        """Multiplies the kernel by a factor, shape (O,), for each output channel."""
        self.factors[-1].rescale(factor)


def _compose(factors: nn.ModuleList, groups: int) -> Tensor:
    kernel, *next_kernels = (factor() for factor in factors)
    for next_kernel in next_kernels:
        kernel = compose_deep_linear(kernel, next_kernel, groups)
    return kernel


@BLOCKS.register_module('deep_linear')
class DeepLinearConv2d(ReparamConv2d, nn.Conv2d):
    """A large conv of plain 3×3 factors; a 1×1 conv has none and is plain.

    ``inner_mult`` is that of :class:`DeepLinearKernel`.
    """

    BLOCK_SIZES = range(DEEP_LINEAR_FROM, sys.maxsize)

    def __init__(self, *args, inner_mult: float = 1.0, **kwargs) -> None:
        self._inner_mult = inner_mult  # Before the base class builds the branches.
        super().__init__(*args, **kwargs)

    def build_branches(self) -> nn.Module:
        def plain(outputs: int, inputs: int, size: int = 3) -> PlainKernel:
            return PlainKernel(outputs, inputs // self.groups, size)

        channels, size = (self.out_channels, self.in_channels), self.kernel_size[0]
        if size == 1:
            return plain(*channels, 1)
        return DeepLinearKernel(plain, *channels, size, self.groups, self._inner_mult)
