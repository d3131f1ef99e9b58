"""Blocks whose branches run side by side on the feature map, each with its norm."""

from collections.abc import Mapping, Sequence
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..functional import embed_1x1
from .branch_kernel import check_branches, choose_branches
from .conv import ReparamConv2d
from .folding import is_fusible, norm_scale
from .plain import PlainConv2d


class MultiBranchConv2d(ReparamConv2d):
    """A sum of branches that each end in a BatchNorm of their own.

    A branch is a :class:`ReparamConv2d` or any other module with an
    ``equivalent_kernel_bias``, a ``kernel`` (before the last norm; None if it has no
    weights) and a ``norm``. Subclasses list the names of branches in
    :attr:`BRANCH_NAMES` and make each branch in ``build_branch``.

    Built by ``conv_cfg``, the block may be followed by a norm of the network, see
    :attr:`has_second_norm`. Deployment folds the norms of the branches, not this norm.

    Args:
        branches, single_init: See :class:`OREPAConv2d`.
        initial_scales (dict[str, float], optional): Initial weight of the last
            BatchNorm of a branch, by branch name. Defaults to None, ones.
        *args, **kwargs: See :class:`ReparamConv2d`. ``norm_cfg`` describes the norms
            of the branches and defaults to ``dict(type='BN')``.

    Raises:
        ValueError: If a branch is unknown, no branch is left, the padding does not
            centre the branches, or the norm has no fold.
    """

    BRANCH_NAMES: tuple[str, ...] = ()
    folds_online = False
    keeps_own_init = True  # Each branch has a norm.

    def __init__(
        self,
        *args,
        norm_cfg: Optional[dict] = None,
        branches: Optional[Sequence[str]] = None,
        initial_scales: Optional[dict[str, float]] = None,
        single_init: bool = False,
        **kwargs,
    ) -> None:
        # Before the base class, which builds the branches.
        self._branch_names = choose_branches(self.BRANCH_NAMES, branches)
        self._initial_scales = dict(initial_scales or {})
        check_branches(self.BRANCH_NAMES, self._initial_scales)
        if single_init:
            scales = dict.fromkeys(self.BRANCH_NAMES, 0.0)
            self._initial_scales = {**scales, 'origin': 1.0, **self._initial_scales}
        self._has_given_norm = norm_cfg is not None
        super().__init__(*args, norm_cfg=norm_cfg or dict(type='BN'), **kwargs)

    @property
    def has_second_norm(self) -> bool:
        """Whether a norm of the network follows: assumed without bias and norm_cfg."""
        return not self._has_given_norm and not self.conv_bias

    def _geometry(self) -> dict:
        """The current geometry of the k×k branches."""
        size, dilation = self.kernel_size[0], _pair(self.dilation)
        reach = dilation[0] * (size // 2)
        padding = self.padding
        if isinstance(padding, str):
            padding = reach if padding == 'same' else 0
        is_centred = _pair(padding) == (reach, reach) and len(set(dilation)) == 1
        if not is_centred or self.padding_mode != 'zeros':
            raise ValueError(
                f'{type(self).__name__} folds its 1x1 branches into the centre of the '
                f'{size}x{size} kernel, which takes padding = dilation * {size // 2} '
                f'= {reach} here, with zeros; found padding={self.padding}, '
                f'dilation={self.dilation}, padding_mode={self.padding_mode!r}'
            )
        return dict(
            stride=_pair(self.stride),
            padding=_pair(padding),
            dilation=dilation,
            padding_mode='zeros',
        )

    def _align(self) -> None:
        """Gives the branches the current geometry of this conv."""
        geometry = self._geometry()
        for module in self.branches.modules():
            fixed = getattr(module, 'fixed_geometry', None)
            if fixed is not None:
                for name, value in {**geometry, **fixed}.items():
                    if getattr(module, name, None) != value:
                        setattr(module, name, value)

    def build_branch(self, name: str) -> Optional[nn.Module]:
        """Makes the branch of a name, or returns None if this conv has none."""
        raise NotImplementedError

    def build_conv(
        self, kind: type[ReparamConv2d] = PlainConv2d, **changes
    ) -> ReparamConv2d:
        """Makes a branch with the arguments of this conv, without bias.

        Args:
            kind (type[ReparamConv2d]): Defaults to :class:`PlainConv2d`.
            **changes: Arguments that differ. ``kernel_size=1`` also sets padding to 0
                and dilation to 1.
        """
        names = ('in_channels', 'out_channels', 'kernel_size', 'groups', 'norm_cfg')
        arguments = {name: getattr(self, name) for name in names}
        geometry = self._geometry()
        if changes.get('kernel_size') == 1:
            changes = dict(padding=0, dilation=1, **changes)
        conv = kind(**{**arguments, **geometry, 'bias': False, **changes})
        conv.fixed_geometry = {n: _pair(changes[n]) for n in geometry if n in changes}
        return conv

    def build_branches(self) -> nn.ModuleDict:
        branches = nn.ModuleDict()
        for name in self._branch_names:
            branch = self.build_branch(name)
            if branch is None:
                continue
            if not is_fusible(branch.norm):
                raise ValueError(
                    f'{type(self).__name__} needs a BatchNorm, which folds, in every '
                    f'branch; found norm_cfg={self.norm_cfg}'
                )
            if name in self._initial_scales:
                nn.init.constant_(branch.norm.weight, self._initial_scales[name])
            branches[name] = branch
        if not branches:
            names = ' or '.join(self._branch_names)
            raise ValueError(f'no branch is left: these channels allow no {names}')
        return branches

    def build_norm(self) -> None:
        """Returns None, because each branch has a norm."""

    def _weight_of_training_form(self) -> Tensor:
        # With an AttributeError, hasattr(conv, 'weight') is False.
        raise AttributeError(
            f'a {type(self).__name__} has no weight while it trains; call '
            'conv.reset_parameters() to draw it anew, conv.start_from(kernel) to set '
            'it, or mmorepa.switch_to_deploy(model) to make it a plain conv'
        )

    def regularized_kernel(self) -> Tensor:
        """The sum of the branches' kernels, each as its BatchNorm scales it.

        ``K = Σ_b t_b·K_b / √(Σ_b t_b²)`` with constant ``t_b = γ_b/√(σ_b²+ε)``. At each
        tap, the sums run over the branches that reach it; identity branches do not
        count. The denominator makes the decay as strong as for one plain kernel. For
        RepVGG blocks this is their authors' "custom L2" (Ding et al., CVPR 2021).
        """
        if self.deployed:
            return self.weight
        size = self.kernel_size[0]
        total, squares = 0, 0
        for branch in self.branches.values():
            kernel = branch.kernel()
            if kernel is None:
                continue
            scale = norm_scale(branch.norm)[:, None, None, None]
            reach = torch.ones_like(kernel[:, :1]) * scale**2
            term = kernel * scale
            if kernel.shape[-1] != size:
                term, reach = embed_1x1(term, size), embed_1x1(reach, size)
            total, squares = total + term, squares + reach
        # If every scale is zero, the sum is zero too.
        return total / squares.sqrt().clamp_min(1e-12)

    def start_from(
        self,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        norm: Optional[Mapping[str, Tensor]] = None,
    ) -> None:
        if bias is not None and norm is not None and 'running_mean' in norm:
            # The plain bias comes before its norm, and this conv's bias after it.
            norm = {**norm, 'running_mean': norm['running_mean'] - bias}
            bias = None
        super().start_from(weight, bias, norm)

    def _start_before_bias(
        self, weight: Tensor, norm: Optional[Mapping[str, Tensor]]
    ) -> None:
        """Gives ``origin`` the kernel and the norm. All other branches return zero.

        Without a norm, the norm of ``origin`` starts as the identity of eval mode.
        """
        if 'origin' not in self.branches:
            raise ValueError(
                "only the branch 'origin' can be a plain conv, and there are only "
                f'{", ".join(self.branches)}'
            )
        for name, branch in self.branches.items():
            if name != 'origin':
                for parameter in (branch.norm.weight, branch.norm.bias):
                    nn.init.zeros_(parameter)
        origin = self.branches['origin']
        ones = torch.ones(self.out_channels, dtype=torch.float64)
        identity = dict(
            weight=ones.add(origin.norm.eps).sqrt(),
            bias=ones * 0,
            running_mean=ones * 0,
            running_var=ones,
        )
        origin.start_from(weight, norm=identity if norm is None else norm)

    def convolve(self, x: Tensor) -> Tensor:
        if '_conv_forward' in vars(self):
            raise TypeError(
                f'a {type(self).__name__} with a _conv_forward of its own does not '
                'train, since each branch has a conv of its own: call '
                'mmorepa.switch_to_deploy(model) first, or take another block'
            )
        self._align()
        total = sum(branch(x) for branch in self.branches.values())
        return total if self.bias is None else total + self.bias[:, None, None]

    def branches_kernel_bias(self, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        size, kernel = self.kernel_size[0], 0
        total = 0 if bias is None else bias
        for branch in self.branches.values():
            term, shift = branch.equivalent_kernel_bias()
            term = term if term.shape[-1] == size else embed_1x1(term, size)
            kernel, total = kernel + term, total + shift
        return kernel, total

    @property
    def last_norms(self) -> list[nn.Module]:
        return [] if self.deployed else [b.norm for b in self.branches.values()]

    @property
    def _deployed_with_bias(self) -> bool:
        return True  # The norms of the branches leave one.
