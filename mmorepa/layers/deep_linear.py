"""Large kernels that are composed of 3×3 kernels."""

import copy
import sys
from collections.abc import Callable

import torch
import torch.fx
from torch import Tensor, nn
from torch.func import functional_call

from ..functional import (
    compose_deep_linear,
    is_followed,
    recomputed,
    solve_deep_linear,
)
from .blocks import BLOCKS
from .plain import PlainKernel
from .reparam_conv import ReparamConv2d

# As for fold_kernel: a node of its own in a symbolic trace.
torch.fx.wrap('compose_deep_linear')

# From this kernel size on, the paper's networks use the deep linear form.
DEEP_LINEAR_FROM = 7


class DeepLinearKernel(nn.Module):
    """A k×k kernel composed of (k−1)/2 kernels of 3×3 (paper, section 3.3).

    The factors map I to M channels, then M to M, and the last one M to O.

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
        self.factors = _Factors(
            build_factor(outputs, inputs) for inputs, outputs in zip(widths, widths[1:])
        )

    def forward(self) -> Tensor:
        """Returns the kernel, shape (O, Ig, k, k)."""
        if is_followed():
            return self.factors(self.groups)
        own = dict(self.factors.named_parameters())

        # A function of tensors: in the backward pass, the module may have others.
        def compose(*tensors: Tensor) -> Tensor:
            named = dict(zip(own, tensors))
            return functional_call(self.factors, named, (self.groups,))

        return recomputed(compose, *own.values())

    @torch.no_grad()
    def start_from(self, kernel: Tensor, start: str) -> None:
        """Gives the last factor the weights with which the kernel is a given one.

        Args:
            kernel (Tensor): Shape (O, Ig, k, k).
            start (str): How the last factor takes its kernel.

        Raises:
            ValueError: If the other factors have too few channels for that.
        """
        *others, last = self.factors
        if others:
            wide = copy.deepcopy(_Factors(others)).double()
            kernel = solve_deep_linear(kernel, wide(self.groups), self.groups)
        last.start_from(kernel, start)

    def rescale(self, factor: Tensor) -> None:
        """Multiplies the kernel by a factor, shape (O,), for each output channel."""
        self.factors[-1].rescale(factor)


class _Factors(nn.ModuleList):
    def forward(self, groups: int) -> Tensor:
        kernel, *others = (factor() for factor in self)
        for other in others:
            kernel = compose_deep_linear(kernel, other, groups)
        return kernel


@BLOCKS.register_module('deep_linear')
class DeepLinearConv2d(ReparamConv2d, nn.Conv2d):
    """A large conv of plain 3×3 factors; a 1×1 conv has none and is plain.

    Args:
        inner_mult (float): Inner channels of the chain by output channels, see
            :class:`DeepLinearKernel`. Defaults to 1.
        *args, **kwargs: See :class:`ReparamConv2d`.
    """

    BLOCK_SIZES = range(DEEP_LINEAR_FROM, sys.maxsize)

    def __init__(self, *args, inner_mult: float = 1.0, **kwargs) -> None:
        self._inner_mult = inner_mult  # Before the base class builds the branches.
        super().__init__(*args, **kwargs)

    def build_branches(self) -> nn.Module:
        def plain(outputs: int, inputs: int, size: int = 3) -> PlainKernel:
            return PlainKernel(outputs, inputs // self.groups, size)

        if self.kernel_size[0] == 1:
            return plain(self.out_channels, self.in_channels, 1)
        return DeepLinearKernel(
            plain,
            self.out_channels,
            self.in_channels,
            self.kernel_size[0],
            self.groups,
            self._inner_mult,
        )
