"""Large kernels as a chain of small ones."""

from typing import Callable, Optional

import torch
from torch import Tensor, nn

from ..functional import compose_deep_linear
from ..utils.autocast import no_autocast
from .plain import PlainKernel
from .reparam_conv import ReparamConv2d


class DeepLinearKernel(nn.Module):
    """A k×k kernel composed of (k−1)/2 kernels of 3×3 (paper, section 3.3).

    The factors map I to O channels, then O to O.

    Args:
        build_factor (Callable): Takes the input channels of a factor and returns a
            module whose ``forward()`` returns its kernel, shape (O, channels / g, 3,
            3).
        out_channels (int): O.
        in_channels (int): I.
        kernel_size (int): k, odd, at least 3.
        groups (int): g. Defaults to 1.
    """

    def __init__(
        self,
        build_factor: Callable[[int], nn.Module],
        out_channels: int,
        in_channels: int,
        kernel_size: int,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.groups = groups
        widths = [in_channels] + [out_channels] * ((kernel_size - 1) // 2 - 1)
        self.factors = nn.ModuleList(build_factor(width) for width in widths)

    def forward(self) -> Tensor:
        """Returns the kernel, shape (O, Ig, k, k)."""
        return self._compose([factor() for factor in self.factors])

    @property
    def has_closed_form(self) -> bool:
        """Whether :meth:`fold` and :meth:`fold_gradients` may be called."""
        # A subclass may have changed what forward() computes.
        return type(self).forward is DeepLinearKernel.forward and all(
            getattr(factor, 'has_closed_form', False) for factor in self.factors
        )

    def fold(self, tensors: dict[str, Tensor], out: Optional[Tensor] = None) -> Tensor:
        """As :meth:`forward`, but without a graph.

        Args:
            tensors (dict[str, Tensor]): Parameters and buffers by name.
            out (Tensor, optional): Where to write the kernel. Defaults to None.
        """
        with torch.no_grad():
            kernel = self._compose(self._fold_factors(tensors))
            return kernel if out is None else out.copy_(kernel)

    def fold_gradients(
        self,
        tensors: dict[str, Tensor],
        grad: Tensor,
        out: Optional[dict[str, Tensor]] = None,
    ) -> dict[str, Tensor]:
        """The derivative of :meth:`fold`, through the factors' own.

        Args:
            tensors (dict[str, Tensor]): Parameters and buffers by name.
            grad (Tensor): The gradient of the kernel.
            out (dict[str, Tensor], optional): Where to write some of the gradients.
                Defaults to None.

        Returns:
            dict[str, Tensor]: The gradient of every parameter, by its name.
        """
        kernels = [k.requires_grad_() for k in self._fold_factors(tensors)]
        with torch.enable_grad():
            composed = self._compose(kernels)
        found = {}
        grads = torch.autograd.grad(composed, kernels, grad)
        for index, (factor, kernel_grad) in enumerate(zip(self.factors, grads)):
            own = factor.fold_gradients(
                _of_factor(tensors, index), kernel_grad, _of_factor(out or {}, index)
            )
            found.update({f'factors.{index}.{name}': g for name, g in own.items()})
        return found

    def _fold_factors(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        return [
            factor.fold(_of_factor(tensors, index))
            for index, factor in enumerate(self.factors)
        ]

    def _compose(self, kernels: list[Tensor]) -> Tensor:
        kernel, *others = kernels
        with no_autocast(kernel.device.type):
            for other in others:
                kernel = compose_deep_linear(kernel, other, self.groups)
        return kernel.contiguous()


def _of_factor(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f'factors.{index}.'
    return {
        name[len(prefix) :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


class DeepLinearConv2d(ReparamConv2d):
    """A large conv of plain 3×3 factors.

    Args:
        *args, **kwargs: See :class:`ReparamConv2d`; the kernel is 3×3 or larger.
    """

    def build_branches(self) -> DeepLinearKernel:
        if self.kernel_size[0] < 3:
            raise ValueError(
                'DeepLinearConv2d takes a kernel of 3x3 or more, found 1x1'
            )
        return DeepLinearKernel(
            lambda channels: PlainKernel(self.out_channels, channels // self.groups, 3),
            self.out_channels,
            self.in_channels,
            self.kernel_size[0],
            self.groups,
        )
