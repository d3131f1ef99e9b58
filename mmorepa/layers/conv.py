"""The base class of re-parameterised convs: train, fold, load, deploy."""

from collections.abc import Callable, Container
from typing import Any, Optional, Union

import torch
import torch.fx
from mmcv.cnn import build_activation_layer, build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..utils.weights import warn_of_damage
from .changes import check_foldable, warn_of_silent_hooks
from .folded_weight import ParametersOfBranches, WeightOfBranches
from .folding import fold, fold_exactly, fuse_norm, is_fusible, is_sharded, to_float64
from .loading import adapt
from .param_groups import warn_if_not_optimized
from .starting import StartsFromKernels

IntPair = Union[int, tuple[int, int]]


class ReparamConv2d(StartsFromKernels, WeightOfBranches):
    """A conv that trains as several linear branches and deploys as one plain conv.

    In training form, :attr:`weight` is the fold of :attr:`branches`, see
    :class:`~mmorepa.layers.folded_weight.FoldedWeight`. The deployed form has no
    :attr:`branches` and no BatchNorm :attr:`norm`. It has the :attr:`weight`, the
    :attr:`bias` and the ``state_dict`` keys of a plain :class:`torch.nn.Conv2d`.
    A new block is a subclass with a :meth:`build_branches`, see docs/new_block.md.

    Kernels of a training form (dtype; gradient to the branches?; BatchNorm inside?)::

        kernel                  that of the branches or autocast;  yes;  none
        folded_kernel           that of the branches;              yes;  none
        regularized_kernel      that of the branches;              yes;  the branches'
        branches_kernel_bias    float64;                           no;   the branches'
        equivalent_kernel_bias  float64;                           no;   all

    Args:
        in_channels, out_channels, stride, padding, dilation, groups, bias: See
            :class:`torch.nn.Conv2d`.
        kernel_size (int | tuple[int, int]): k, odd and square.
        padding_mode (str): Only ``'zeros'``.
        norm_cfg (dict, optional): Normalisation after the conv. Deployment folds
            BatchNorm and keeps any other kind. Defaults to None.
        act_cfg (dict, optional): Activation at the end. Defaults to None.
        deploy (bool): Builds the deployed form directly. Defaults to False.

    Raises:
        ValueError: If the arguments describe a conv that has no fold.
    """

    # Networks of this block type use this class for these kernel sizes only.
    BLOCK_SIZES: Container[int] = (3, 5)
    # False if the kernel is stored, or if the branches run on the feature map.
    folds_online = True
    # Set while a held() or folded() block is open. Then the conv asks it for a kernel.
    training_scope: Any = None
    evaluation_scope: Any = None
    # Whether the kernel has channels last in memory: see mmorepa.set_channels_last.
    channels_last = False
    # Whether to warn when loaded weights hold NaN, Inf or a negative variance.
    warns_of_damage = True
    # Whether the last state dict held a plain kernel.
    is_plain_start = False
    # The names of the attributes that the constructor sets.
    _built: frozenset[str] = frozenset()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Union[IntPair, str] = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        *,
        norm_cfg: Optional[dict] = None,
        act_cfg: Optional[dict] = None,
        deploy: bool = False,
    ) -> None:
        _check_has_fold(type(self).__name__, kernel_size, padding_mode)
        arguments = (in_channels, out_channels, kernel_size, stride, padding, dilation)
        # Only the deployed form needs the kernel that nn.Conv2d makes. On 'meta',
        # the kernel takes no memory, no time and no random numbers.
        super().__init__(*arguments, groups, bias, padding_mode, device='meta')
        self.conv_bias = bias
        self.norm_cfg = norm_cfg
        self.act = None if act_cfg is None else build_activation_layer(act_cfg)
        # Setting these later would make torch.compile recompile.
        self.training_scope = self.evaluation_scope = None
        self.channels_last = self.is_plain_start = False
        self.become_training_form(with_branches=not deploy)
        if deploy:
            shift = torch.empty(out_channels) if self._deployed_with_bias else None
            self._become_plain(torch.empty(self.kernel_shape), shift)
            self.reset_parameters()
        else:
            self._start_fresh()
        self._built = frozenset((*vars(self), '_built'))

    def build_branches(self) -> nn.Module:
        """Makes a module whose ``forward()`` returns the kernel, (O, Ig, k, k).

        It may read the attributes of :class:`torch.nn.Conv2d`, such as ``groups``.
        """
        raise NotImplementedError

    def build_norm(self) -> Optional[nn.Module]:
        """Makes :attr:`norm` from ``norm_cfg``, or returns None without one."""
        if self.norm_cfg is None:
            return None
        return build_norm_layer(self.norm_cfg, self.out_channels)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Convolution, normalisation, activation: (N, I, H, W) to (N, O, H', W')."""
        if isinstance(x, torch.fx.Proxy):
            node = leaf_call(self, x)
            if node is not None:
                return node
        if not isinstance(self, ReparamConv2d):
            return self.forward(x)  # A method that was bound before its deployment.
        norm, act = self.norm, self.act
        scope = self.evaluation_scope
        fused = None if scope is None else scope.fused_conv(self)
        if fused is not None:
            kernel, bias, norm = fused
            x = self._conv_forward(x, kernel, bias)
        elif self.deployed:
            x = self._conv_forward(x, self.weight, self.bias)
        else:
            if _is_exported_to_onnx():
                raise RuntimeError(
                    'a training form is not exported to ONNX: call '
                    'mmorepa.switch_to_deploy(model) first'
                )
            x = self.convolve(x)
        if norm is not None:
            x = norm(x)
        return x if act is None else act(x)

    def convolve(self, x: Tensor) -> Tensor:
        """Runs the branches without :attr:`norm`: (N, I, H, W) to (N, O, H', W')."""
        return self._conv_forward(x, self.kernel(), self.bias)

    def kernel(self) -> Tensor:
        """The kernel that the conv runs with, shape (O, Ig, k, k).

        In training form, its gradient reaches the branches. Each call folds, unless
        a block of :func:`mmorepa.folded` or of folded training is open.
        """
        if self.deployed:
            return self.weight
        if self.training_scope is not None:
            leaf = self.training_scope.kernel(self)
            if leaf is not None:
                return leaf
        scope = self.evaluation_scope
        return self.folded_kernel() if scope is None else scope.kernel(self)

    def folded_kernel(self) -> Tensor:
        """The kernel of a training form, folded now, shape (O, Ig, k, k)."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warn_if_not_optimized(self.branches)
        return fold(self.branches, self.memory_format)

    def regularized_kernel(self) -> Tensor:
        """The kernel whose L2 norm a weight decay should penalise, (O, Ig, k, k).

        Normalisation undoes the scale of a kernel, so this is the kernel before it.
        """
        return self.kernel()

    @torch.no_grad()
    def equivalent_kernel_bias(self) -> tuple[Tensor, Optional[Tensor]]:
        """The plain conv that equals this one in eval mode, BatchNorm included.

        Equation: ``W_eq = W·γ/√(σ²+ε)``, ``b_eq = β + (b − μ)·γ/√(σ²+ε)``. Both are
        in float64, of shapes (O, Ig, k, k) and (O,).
        """
        bias = None if self.bias is None else to_float64(self.bias)
        if self.deployed:
            return to_float64(self.weight), bias
        kernel, bias = self.branches_kernel_bias(bias)
        return fuse_norm(kernel, bias, self.norm) if self.fuses_norm else (kernel, bias)

    def branches_kernel_bias(
        self, bias: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Kernel and bias before :attr:`norm`, in float64; ``bias`` is this conv's."""
        return fold_exactly(self.branches), bias

    def switch_to_deploy(self) -> None:
        """Turns this module into the plain conv, in place.

        The fold is computed in float64 and stored in the dtype and on the device
        of the branches. Calling it again does nothing.

        Raises:
            TypeError: If a subclass overrides ``kernel()`` or ``convolve()``, which
                the deployed form does not call, or if the branches have no parameters.
        """
        if self.deployed:
            return
        check_foldable(self)
        warn_of_silent_hooks(self)
        like = next(self.branches.parameters())
        # With a norm, the deployed bias comes from the norm, not from this parameter.
        former = None if self.last_norms else self.bias
        all_but_bias = [p for p in self.parameters() if p is not former]
        is_trained = any(p.requires_grad for p in all_but_bias)
        # Tensors that are made in inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            kernel, bias = self.equivalent_kernel_bias()
            self._become_plain(kernel.to(like), None if bias is None else bias.to(like))
            self.weight.requires_grad_(is_trained)
            vars(self.weight).update(vars(like))
            if bias is not None:
                self.bias.requires_grad_(is_trained)
            if former is not None:
                self.bias.requires_grad_(former.requires_grad)
                vars(self.bias).update(vars(former))

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the kernel. Checkpoints do not record it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """(O, Ig, k, k)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def last_norms(self) -> list[nn.Module]:
        """The norms whose outputs are added up. Empty once they are folded."""
        return [] if self.norm is None else [self.norm]

    @property
    def fuses_norm(self) -> bool:
        """Whether deployment folds :attr:`norm` into the kernel."""
        return is_fusible(self.norm)

    @property
    def _deployed_with_bias(self) -> bool:
        return self.conv_bias or self.fuses_norm

    @property
    def is_held_in_training(self) -> bool:
        """Whether folded training uses a :class:`KernelLeaf` for this conv."""
        if self.deployed or not self.folds_online:
            return False
        parameters = list(self.branches.parameters())
        return any(p.requires_grad for p in parameters) and not is_sharded(parameters)

    def forget_folds(self) -> None:
        """Tells open scopes that the kernel has changed."""
        for scope in (self.training_scope, self.evaluation_scope):
            if scope is not None:
                scope.forget(self)

    def become_training_form(self, with_branches: bool = True) -> None:
        """Gives this module fresh parameters of the training form."""
        self.deployed = False
        self._parameters.pop('weight', None)
        vars(self)['_parameters'] = ParametersOfBranches(self._parameters)
        self.bias = None
        if self.conv_bias:
            self.bias = nn.Parameter(torch.zeros(self.out_channels))
        self.norm = self.build_norm()
        self.branches = self.build_branches() if with_branches else None

    def _become_plain(self, weight: Tensor, bias: Optional[Tensor]) -> None:
        """Stores copies of a weight and a bias as the parameters of a plain conv."""
        # Copy before deleting the branches: if memory runs out, nothing is lost.
        weight = nn.Parameter(weight.clone(memory_format=self.memory_format))
        bias = None if bias is None else nn.Parameter(bias.clone())
        self.deployed = True
        del self.branches
        if self.fuses_norm:
            self.norm = None
        extra_parameters = {k: v for k, v in self._parameters.items() if k != 'bias'}
        vars(self)['_parameters'] = {}  # The weight comes first, as in a plain conv.
        self.weight = weight
        self.register_parameter('bias', bias)
        self._parameters.update(extra_parameters)
        self.forget_folds()

    def train(self, mode: bool = True) -> 'ReparamConv2d':
        self.forget_folds()
        return super().train(mode)

    def _apply(self, fn: Callable, *args, **kwargs) -> 'ReparamConv2d':
        self.forget_folds()
        # A 4-D tensor shows what memory format Module.to(memory_format=...) asks for.
        probe = torch.empty(2, 2, 2, 2).to(memory_format=self.memory_format)
        self.channels_last = fn(probe).is_contiguous(memory_format=torch.channels_last)
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: dict, *args
    ) -> None:
        error_msgs = args[-1]  # The loaders of MMEngine and PyTorch pass one list.
        if self.warns_of_damage:
            warn_of_damage(state_dict, prefix, error_msgs)
        assign = metadata.get('assign_to_params_buffers', False)
        self.is_plain_start = adapt(self, state_dict, prefix, error_msgs, assign)
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        self.forget_folds()

    def __getstate__(self) -> dict:
        # A copy belongs to no scope.
        scopes = dict(training_scope=None, evaluation_scope=None)
        return {**super().__getstate__(), **scopes}

    def extra_repr(self) -> str:
        form = 'deployed' if self.deployed else 'training form'
        return f'{super().extra_repr()}, {form}'


def leaf_call(module: nn.Module, x: torch.fx.Proxy) -> Optional[torch.fx.Proxy]:
    """The node of a symbolic trace that calls a module as a whole.

    None if the module is traced itself, or has a ``forward()`` that calls this one.
    """
    method = type(module).forward
    if (
        x.tracer.root is module
        or 'forward' in vars(module)
        or not method.__module__.startswith('mmorepa.')
    ):
        return None
    name = x.tracer.path_of_module(module)
    return x.tracer.create_proxy('call_module', name, (x,), {})


# Evaluate this at trace time. Otherwise the compiler would replace it by False.
@torch.compiler.assume_constant_result
def _is_exported_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _check_has_fold(name: str, kernel_size: IntPair, padding_mode: str) -> None:
    height, width = _pair(kernel_size)
    if height != width or height % 2 == 0 or height < 1:
        raise ValueError(
            f'{name} takes an odd, square kernel (1, 3, 5, 7, …), since its branches '
            f'share one centre; found kernel_size={kernel_size}'
        )
    if padding_mode != 'zeros':
        raise ValueError(
            f"{name} takes padding_mode='zeros' only, found {padding_mode!r}; pad the "
            'input yourself (torch.nn.functional.pad) and use padding=0'
        )
