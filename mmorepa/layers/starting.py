"""Starts branches from a given kernel or from fresh parameters."""

from collections.abc import Mapping
from typing import Optional

import torch
from torch import Tensor, nn

from .folding import check_not_sharded, named_tensors

_COMPUTED = (
    'computed from other tensors (pruned or parametrized), and what is written to it '
    'is lost: call torch.nn.utils.prune.remove or '
    'torch.nn.utils.parametrize.remove_parametrizations before a reset or a start'
)


class StartsFromKernels(nn.Conv2d):
    """A conv whose branches can start from a plain kernel or from fresh parameters."""

    _fresh: Optional[list[float]] = None

    def start_from(
        self,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        norm: Optional[Mapping[str, Tensor]] = None,
    ) -> None:
        """Makes the training form compute the same as a plain conv.

        ``origin`` becomes the plain kernel, scaled by one. Every other branch is scaled
        by zero and made small, so that a first step moves the kernel about as far as
        that of a plain conv. A deep linear kernel does this in its last factor. If the
        branches have BatchNorms, the norm of ``origin`` becomes the norm of the plain
        conv, and the last weights and biases of all other norms become zero.

        Args:
            weight (Tensor): The plain kernel, shape (O, Ig, k, k).
            bias (Tensor, optional): The plain bias, shape (O,). Defaults to None:
                zeros if this conv has a bias.
            norm (Mapping[str, Tensor], optional): The state dict of the BatchNorm
                after the plain conv, if this conv has one. Defaults to None, which
                keeps the norm unchanged.

        Raises:
            ValueError: If the conv is deployed, a shape does not fit, or the branches
                cannot give this kernel.
        """
        if self.deployed:
            raise ValueError('the conv is deployed: it has a weight, and no branches')
        if bias is not None and self.bias is None:
            raise ValueError('there is a bias, and the conv has none (bias=False)')
        for what, tensor, shape in (
            ('kernel', weight, self.kernel_shape),
            ('bias', bias, (self.out_channels,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f'the {what} is of {tuple(tensor.shape)}, not {shape}')
        with torch.inference_mode(False), torch.no_grad():
            self._start_before_bias(weight, norm)
            if self.bias is not None:
                self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)
        self.forget_folds()

    def _start_before_bias(
        self, weight: Tensor, norm: Optional[Mapping[str, Tensor]]
    ) -> None:
        if norm is not None:
            if self.norm is None:
                raise ValueError('there is a norm, and the conv has none')
            load_norm(self.norm, norm)
        self.set_kernel(weight)

    def set_kernel(self, kernel: Tensor, exactly: bool = True) -> None:
        """Sets the branches so that they fold to a kernel.

        Args:
            kernel (Tensor): Shape (O, Ig, k, k).
            exactly (bool): Whether to raise a ValueError if the branches cannot give
                this kernel. If False, the branches then take only the norms of its
                output channels. Defaults to True.
        """
        branches = self.branches
        parameters = list(branches.parameters())
        if not parameters and exactly:
            raise ValueError(f'{type(self).__name__} has a fixed kernel')
        if not parameters or parameters[0].is_meta:
            return
        check_not_sharded(parameters)
        with torch.inference_mode(False), torch.no_grad():
            kernel = kernel.to(parameters[0].device, torch.float64)
            try:
                if not hasattr(branches, 'set_kernel'):
                    raise ValueError(f'{type(branches).__name__} has no set_kernel')
                branches.set_kernel(kernel)
            except ValueError:
                if exactly:
                    raise
                if hasattr(branches, 'rescale'):
                    folded = self.folded_kernel().double()
                    norms = [k.flatten(1).norm(dim=1) for k in (kernel, folded)]
                    branches.rescale(norms[0] / norms[1].clamp_min(1e-12))
        self.forget_folds()

    def reset_parameters(self) -> None:
        """Draws all parameters again, as the constructor does."""
        if self.deployed:
            super().reset_parameters()
            return
        copy_fresh(self.branches, self.build_branches())
        if self.norm is not None and hasattr(self.norm, 'reset_parameters'):
            self.norm.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self._start_fresh()
        self.forget_folds()

    def _start_fresh(self) -> None:
        self._fresh = fingerprint(self.branches)
        if not self.keeps_own_init:
            nn.Conv2d.reset_parameters(self)  # Writes to the weight and the bias.
            self._fresh = fingerprint(self.branches)

    def refresh(self) -> None:
        """Draws the branches again, unless nothing has changed since the last draw."""
        if self._fresh == fingerprint(self.branches):
            return
        copy_fresh(self.branches, self.build_branches())
        self._fresh = fingerprint(self.branches)
        self.forget_folds()

    @property
    def keeps_own_init(self) -> bool:
        """Whether init_weights of a network leaves fresh branches unchanged.

        This is so if a norm follows, because a norm cancels the scale of the kernel. A
        conv without a bias counts as followed by a norm.
        """
        return self.norm is not None or not self.conv_bias


@torch.no_grad()
def copy_fresh(branches: nn.Module, fresh: nn.Module) -> None:
    """Copies the values of fresh branches into branches, in place."""
    tensors, values = named_tensors(branches), named_tensors(fresh)
    if tensors.keys() != values.keys():
        raise ValueError(f'a weight of its branches is {_COMPUTED}')
    check_not_sharded(tensors.values())
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def load_norm(norm: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a norm layer. The state dict may lack only ``num_batches_tracked``."""
    keys = norm.load_state_dict(state_dict, strict=False)
    missing = [key for key in keys.missing_keys if key != 'num_batches_tracked']
    if missing or keys.unexpected_keys:
        raise ValueError(
            f'its norm has {", ".join(state_dict)}, and {type(norm).__name__} has '
            f'{", ".join(norm.state_dict())}'
        )


def fingerprint(branches: nn.Module) -> list[float]:
    """The sums of the parameters. If a sum differs later, a parameter was changed."""
    tensors = [p.detach() for p in branches.parameters()]
    # Fake tensors have no sum.
    is_real = all(type(t) is Tensor and not t.is_meta for t in tensors)
    return [float(t.sum()) for t in tensors] if is_real else []


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter to write to. Raises a ValueError if the tensor is computed."""
    if module._parameters.get(name) is None:
        raise ValueError(f'{name!r} is {_COMPUTED}')
    return module._parameters[name]
