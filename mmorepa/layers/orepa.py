"""OREPA convolutions: many linear branches, one kernel, one convolution."""

import sys
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from ..functional import identity_1x1
from .blocks import BLOCKS
from .branch_kernel import BranchKernel, check_branches
from .conv import ReparamConv2d
from .deep_linear import DEEP_LINEAR_FROM, DeepLinearKernel


class OREPAKernel(BranchKernel):
    """The k×k kernel of OREPA: a scaled sum of six linear branches.

    ``K = Σ_b scale_b · K_b`` per output channel (paper, section 3.2). The scale of a
    branch replaces its BatchNorm. The branches are

    - ``origin``: a plain k×k kernel
    - ``average``: 1×1 conv, then k×k average pooling
    - ``frequency``: 1×1 conv, then a fixed cosine filter per channel
    - ``pointwise_kxk``: 1×1 conv (initially the identity), then a k×k conv
    - ``pointwise``: 1×1 conv
    - ``depthwise_separable``: depthwise k×k conv with expansion 8, then a 1×1 conv

    Args:
        out_channels (int): O.
        in_channels (int): I.
        kernel_size (int): k.
        groups (int): g. Defaults to 1.
        branches (Sequence[str], optional): The names of the branches to build.
            Defaults to all.
        initial_scales (dict[str, float], optional): Initial values of ``scale`` by
            branch, in place of :attr:`INITIAL_SCALES`. Defaults to None.
        kaiming_a (float): The negative slope that the Kaiming-uniform
            initialisation of every weight assumes. Defaults to 0.

    Raises:
        ValueError: If a branch is unknown, or no branch is left.
    """

    INITIAL_SCALES = {
        'origin': 0.25,
        'average': 0.25,
        'frequency': 0.0,
        'pointwise_kxk': 0.5,
        'pointwise': 1.0,
        'depthwise_separable': 0.5,
    }

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        kernel_size: int,
        groups: int = 1,
        branches: Optional[Sequence[str]] = None,
        initial_scales: Optional[dict[str, float]] = None,
        kaiming_a: float = 0.0,
    ) -> None:
        inputs, size = in_channels // groups, (kernel_size, kernel_size)
        super().__init__((out_channels, inputs, *size), groups, branches)
        hidden = in_channels if groups <= 4 else 2 * in_channels  # As published.
        expansion = self.branch_sum.expansion
        shapes = {
            'weight_origin': (out_channels, inputs, *size),
            'weight_average': (out_channels, inputs, 1, 1),
            'weight_frequency': (out_channels, inputs, 1, 1),
            'weight_pointwise_kxk_1': (hidden, inputs, 1, 1),
            'weight_pointwise_kxk_2': (out_channels, hidden // groups, *size),
            'weight_pointwise': (out_channels, inputs, 1, 1),
            'weight_depthwise': (expansion * in_channels, 1, *size),
            'weight_separable': (out_channels, expansion * inputs, 1, 1),
        }
        for name, shape in shapes.items():
            if name not in self.branch_sum.roles:
                continue
            if name == 'weight_pointwise_kxk_1':
                weight = torch.zeros(shape)  # The fold adds the identity.
            else:
                weight = _kaiming_uniform(shape, kaiming_a)
            weight = self.branch_sum.as_stored(name, weight)
            self.register_parameter(name, nn.Parameter(weight))
        self.add_scale(initial_scales)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # An earlier version may have saved the module.
        for name in self.branch_sum.roles:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.data = self.branch_sum.from_former(name, parameter.data)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
    ) -> None:
        for name in self.branch_sum.roles:
            key = prefix + name
            if key in state_dict:
                state_dict[key] = self.branch_sum.from_former(name, state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class OREPAPointwiseKernel(BranchKernel):
    """The 1×1 kernel of OREPA: ``K = scale_0 · origin + scale_1 · (second ∘ first)``.

    The wider of the two composed 1×1 convs is square and starts as the identity.

    Takes the arguments of :class:`OREPAKernel` except ``kernel_size``. ``kaiming_a``
    defaults to 1.
    """

    INITIAL_SCALES = {'origin': 1.0, 'pointwise_pointwise': 0.5}

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        groups: int = 1,
        branches: Optional[Sequence[str]] = None,
        initial_scales: Optional[dict[str, float]] = None,
        kaiming_a: float = 1.0,
    ) -> None:
        shape = (out_channels, in_channels // groups, 1, 1)
        super().__init__(shape, groups, branches)
        square = 'weight_first' if out_channels > in_channels else 'weight_second'
        side = min(out_channels, in_channels)
        for name in ('weight_origin', 'weight_first', 'weight_second'):
            if name not in self.branch_sum.roles:
                continue
            if name == square:
                weight = identity_1x1(side, side // groups)
            else:
                weight = _kaiming_uniform(shape, kaiming_a)
            self.register_parameter(name, nn.Parameter(weight))
        self.add_scale(initial_scales)


class OREPADeepLinearKernel(DeepLinearKernel):
    """A large kernel composed of (k−1)/2 OREPA 3×3 kernels: the deep linear stem.

    Takes the arguments of :class:`DeepLinearKernel` except ``build_factor``, and
    passes all other arguments to each :class:`OREPAKernel`.
    """

    def __init__(
        self, *args, groups: int = 1, inner_mult: float = 1.0, **kwargs
    ) -> None:
        def factor(outputs: int, inputs: int) -> OREPAKernel:
            return OREPAKernel(outputs, inputs, 3, groups, **kwargs)

        super().__init__(factor, *args, groups, inner_mult)


@BLOCKS.register_module('orepa')
class OREPAConv2d(ReparamConv2d, nn.Conv2d):
    """A conv that trains OREPA's branches and folds them into one kernel in each pass.

    ``conv_cfg=dict(type='OREPAConv2d')`` makes OpenMMLab's modules use such convs. The
    kernel is an :class:`OREPAPointwiseKernel` for k = 1, an :class:`OREPAKernel` for 3
    and 5, and an :class:`OREPADeepLinearKernel` from 7 on, as in the paper's networks.

    Args:
        branches (Sequence[str], optional): The names of the branches to build, for
            ablations. A kernel ignores names of other kernels. Defaults to all.
        initial_scales (dict[str, float], optional): Initial scale by branch name.
            Defaults to None, the scales of the paper.
        single_init (bool): Whether the plain kernel starts with a scale of one and
            every other branch with zero, unless ``initial_scales`` names it.
            Defaults to False.
        kaiming_a (float, optional): See :class:`OREPAKernel`. Defaults to None, the
            paper's value for each kernel.
        inner_mult (float): See :class:`DeepLinearKernel`. Defaults to 1.
        *args, **kwargs: See :class:`ReparamConv2d`.

    Raises:
        ValueError: If a branch is not known, or none is left.

    Examples:
        >>> conv = OREPAConv2d(64, 128, 3, stride=2, padding=1, bias=False)
        >>> y = conv(torch.rand(1, 64, 56, 56))  # (1, 128, 28, 28)
        >>> conv.switch_to_deploy()  # now a plain conv with the same outputs
    """

    BLOCK_SIZES = range(1, sys.maxsize)

    def __init__(
        self,
        *args,
        branches: Optional[Sequence[str]] = None,
        initial_scales: Optional[dict[str, float]] = None,
        single_init: bool = False,
        kaiming_a: Optional[float] = None,
        inner_mult: float = 1.0,
        **kwargs,
    ) -> None:
        known = {**OREPAKernel.INITIAL_SCALES, **OREPAPointwiseKernel.INITIAL_SCALES}
        scales = dict(initial_scales or {})
        check_branches(known, (*(branches or ()), *scales))
        if single_init:
            scales = {**dict.fromkeys(known, 0.0), 'origin': 1.0, **scales}
        # Before the base class, which builds the branches.
        self._branch_names = branches
        self._initial_scales = scales
        self._kaiming_a = kaiming_a
        self._inner_mult = inner_mult
        super().__init__(*args, **kwargs)

    def build_branches(self) -> nn.Module:
        size = self.kernel_size[0]
        channels = (self.out_channels, self.in_channels)
        kernel = OREPAPointwiseKernel if size == 1 else OREPAKernel
        known = kernel.INITIAL_SCALES
        scales = {k: v for k, v in self._initial_scales.items() if k in known}
        options = dict(groups=self.groups, initial_scales=scales)
        if self._branch_names is not None:
            options['branches'] = [name for name in self._branch_names if name in known]
        if self._kaiming_a is not None:
            options['kaiming_a'] = self._kaiming_a
        if size == 1:
            return OREPAPointwiseKernel(*channels, **options)
        if size < DEEP_LINEAR_FROM:
            return OREPAKernel(*channels, size, **options)
        options['inner_mult'] = self._inner_mult
        return OREPADeepLinearKernel(*channels, size, **options)


def _kaiming_uniform(shape: Sequence[int], a: float) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=a)
