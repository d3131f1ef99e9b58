"""The base class of re-parameterised convs: train, fold, load, deploy."""

import copy
import functools
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.fx
from mmcv.cnn import build_activation_layer, build_norm_layer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair
from torch.nn.utils import skip_init

from ..functional import fuse_bn, is_being_traced
from ..utils.autocast import HALF_DTYPES, no_autocast
from ..utils.errors import CheckpointError
from ..utils.weights import warn_of_flaws
from .folded_weight import NO_PARAMETER, FoldedWeight
from .param_groups import watch

if TYPE_CHECKING:
    from .holding import KernelLeaf

IntPair = Union[int, tuple[int, int]]
STARTS = ('quiet', 'balanced')


def in_memory_format(kernel: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A kernel by whose strides a conv gives its output this format.

    Args:
        kernel (Tensor): Shape (O, Ig, k, k).
        memory_format (torch.memory_format): ``torch.channels_last``, which has no
            effect where a side of 1 leaves the choice to the conv's input, or
            ``torch.contiguous_format``.
    """
    if memory_format == torch.channels_last:
        return kernel.contiguous(memory_format=memory_format)
    # Flat in between: with a side of 1, memory counts as contiguous although the
    # strides are those of channels last, and the output would have channels last.
    return kernel.reshape(-1).view(kernel.shape)


class ReparamConv2d(nn.Conv2d):
    """A conv that trains as several linear branches and deploys as one plain conv.

    In training form the branches live in :attr:`branches`, and
    :attr:`weight` is their fold, to read and not to set; what takes it for a
    parameter (pruning, weight and spectral norm) goes to the weights of the branches.
    Deployed, :attr:`branches` and a BatchNorm :attr:`norm` are gone, and
    :attr:`weight` and :attr:`bias` are those of a plain :class:`torch.nn.Conv2d`,
    whose ``state_dict`` keys it shares.

    A new block is a subclass with a ``build_branches`` that returns a module
    whose ``forward()`` maps its parameters to the kernel. BranchSum, convolution,
    normalisation, activation, deployment and loading follow from it.

    Args:
        in_channels (int): I.
        out_channels (int): O.
        kernel_size (int | tuple[int, int]): k, odd and square.
        stride (int | tuple[int, int]): Defaults to 1.
        padding (int | tuple[int, int] | str): Zero padding, as
            :class:`torch.nn.Conv2d` takes it. Defaults to 0.
        dilation (int | tuple[int, int]): Defaults to 1.
        groups (int): g. Defaults to 1.
        bias (bool): Whether a bias is added to the conv. Defaults to True.
        padding_mode (str): Only ``'zeros'``. Defaults to ``'zeros'``.
        norm_cfg (dict, optional): Normalisation after the conv. Batch
            normalisation is folded for deployment, any other kind stays.
            Defaults to None.
        act_cfg (dict, optional): Activation after all that. Defaults to None.
        deploy (bool): Builds the deployed form directly. Defaults to False.
        start (str): How a plain kernel is split into branches, see
            :meth:`start_from`. Defaults to ``'quiet'``.

    Raises:
        ValueError: If the arguments describe a conv that has no fold.
    """

    # The kernel sizes for which networks of its block type have this conv; convs of
    # other sizes are plain. By conv_cfg, all sizes are of one type.
    BLOCK_SIZES: Container[int] = (3, 5)
    # Whether kernel() takes a fold, rather than a look at a parameter.
    folds_online = True
    # What open scopes serve, for each conv alone: see mmorepa.layers.holding.
    held: Optional['KernelLeaf'] = None
    reduced_kernel: Optional['KernelLeaf'] = None
    _served: Optional[dict] = None
    # The memory of the kernel: see mmorepa.set_channels_last.
    channels_last = False
    # Whether damaged weights that are loaded are told of.
    warns_of_flaws = True
    # Whether the last state dict held a plain kernel.
    is_plain_start = False
    # The attributes that the constructor sets, and those that this package sets later:
    # all others are somebody else's.
    _built: frozenset[str] = frozenset()
    SET_LATER = frozenset(
        ('held', 'reduced_kernel', '_served', 'channels_last', 'is_plain_start')
        + ('warns_of_flaws', 'own_geometry', '_fresh')
    )
    _fresh: Optional[list[float]] = None

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
        start: str = 'quiet',
    ) -> None:
        _check_start(start)
        _check_has_fold(type(self).__name__, kernel_size, padding, padding_mode)
        # On 'meta', the kernel of the plain conv takes no memory, no time and no
        # random numbers: only the deployed form has one.
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device='meta',
        )
        self.conv_bias = bias
        self.norm_cfg = norm_cfg
        self.start = start
        self.act: Optional[nn.Module] = None
        if act_cfg is not None:
            self.act = build_activation_layer(act_cfg)
        self._become_training_form(with_branches=not deploy)
        if deploy:
            self._become_plain(self._deployed_with_bias)
        else:
            self._start_as_built()
        self._built = frozenset((*vars(self), '_built'))

    def build_branches(self) -> nn.Module:
        """Makes the parameters of the training form.

        The attributes of :class:`torch.nn.Conv2d` (``in_channels``, ``groups``,
        …) are set when this is called.

        Returns:
            nn.Module: Its ``forward()`` takes nothing and returns the kernel,
            shape (O, Ig, k, k).
        """
        raise NotImplementedError

    def kernel(self) -> Tensor:
        """The kernel that the conv runs with, before normalisation.

        In training form it carries the gradient to the branches if gradients
        are enabled.

        Returns:
            Tensor: Shape (O, Ig, k, k).
        """
        if self.deployed:
            return self.weight
        with_grad = torch.is_grad_enabled()
        if self.held is not None and with_grad:
            if not self.held.is_served():
                # A forward pass outside of the block folds, and so do its
                # checkpointed parts when they run again.
                self.held = None
            # A compiler takes the parameters for granted.
            elif torch.compiler.is_compiling() or self.held.was_folded_from(
                self.branches.parameters()
            ):
                return self.held.leaf
        if self._served is None or is_being_traced():
            return self.folded_kernel()
        key = 'trained kernel' if with_grad else 'kernel'
        if key not in self._served:
            # Outside of inference mode, whose tensors could serve nothing else.
            with torch.inference_mode(False), torch.set_grad_enabled(with_grad):
                self._served[key] = self.folded_kernel()
        return self._served[key]

    def folded_kernel(self) -> Tensor:
        """The kernel, folded now.

        In float32 or better whatever the context says: the sum of several branches
        loses digits in half precision, and costs nothing compared with the
        convolution itself.

        Returns:
            Tensor: Shape (O, Ig, k, k), in the dtype of the branches.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            watch(self)
        tensors = [*self.branches.parameters(), *self.branches.buffers()]
        if not tensors:  # A wrapper has put other tensors in the parameters' place.
            return self.branches()
        _check_is_whole(tensors)
        like = tensors[0]
        with no_autocast(like.device.type):
            if like.dtype not in HALF_DTYPES:
                kernel = self.branches()
            else:
                named = _named_tensors(self.branches)
                wide = {name: tensor.float() for name, tensor in named.items()}
                kernel = functional_call(self.branches, wide, ()).to(like.dtype)
            return in_memory_format(kernel, self.memory_format)

    @property
    def is_held_in_training(self) -> bool:
        """Whether folded training makes a leaf of the kernel."""
        if self.deployed or not self.folds_online:
            return False
        parameters = list(self.branches.parameters())
        return any(p.requires_grad for p in parameters) and not _is_sharded(parameters)

    @contextmanager
    def serve_folds(self) -> Iterator[None]:
        """Folds once inside of the block: see :func:`mmorepa.folded`."""
        if self._served is not None:
            yield
            return
        self._served = {}
        try:
            yield
        finally:
            # As it was before, or compiled code would be compiled again.
            del self._served

    def regularized_kernel(self) -> Tensor:
        """The kernel whose L2 norm a weight decay should penalise.

        Normalisation undoes the scale of a kernel, so this is the kernel before it.

        Returns:
            Tensor: Shape (O, Ig, k, k), with a gradient.
        """
        return self.kernel()

    def forward(self, x: Tensor) -> Tensor:
        """Convolution, normalisation, activation.

        A training form folds here, unless a block of :func:`mmorepa.folded` or folded
        training is open.

        Args:
            x (Tensor): Shape (N, I, H, W).

        Returns:
            Tensor: Shape (N, O, H', W').
        """
        if isinstance(x, torch.fx.Proxy):
            node = leaf_call(self, x)
            if node is not None:
                return node
        folds = self._served
        if folds is not None and not (
            self.training or torch.is_grad_enabled() or is_being_traced()
        ):
            if 'plain' not in folds:
                folds['plain'] = self._plain_conv()
            if folds['plain'] is not None:
                kernel, bias, norm, act = folds['plain']
                x = self._conv_forward(x, kernel, bias)
                x = x if norm is None else norm(x)
                return x if act is None else act(x)
        norm, act = self.norm, self.act
        if self.deployed:
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
        """The training form, up to normalisation.

        Args:
            x (Tensor): Shape (N, I, H, W).

        Returns:
            Tensor: Shape (N, O, H', W').
        """
        return self._conv_forward(x, self.kernel(), self.bias)

    @torch.no_grad()
    def equivalent_kernel_bias(self) -> tuple[Tensor, Optional[Tensor]]:
        """The plain conv that equals this one in eval mode, BatchNorm included.

        Equation: ``W_eq = W·γ/√(σ²+ε)``, ``b_eq = β + (b − μ)·γ/√(σ²+ε)``.

        Returns:
            tuple[Tensor, Tensor | None]: Kernel, shape (O, Ig, k, k), and bias,
            shape (O,), both in float64.
        """
        bias = None if self.bias is None else _double(self.bias)
        if self.deployed:
            return _double(self.weight), bias
        return self._with_norm(*self.branches_kernel_bias(bias))

    def _plain_conv(self) -> Optional[tuple]:
        """Kernel, bias, norm if it is not folded, and activation of eval mode."""
        # A BatchNorm may be in another mode than the conv that it belongs to, and
        # somebody may be waiting for its inputs or outputs.
        inner = list(self.modules())[1:]
        if self.deployed or self._changed_fold() or any(map(_must_run, inner)):
            return None
        with torch.inference_mode(False), torch.no_grad():
            return (*self._fused(), None if self._fuses_norm else self.norm, self.act)

    def _fused(self) -> tuple[Tensor, Optional[Tensor]]:
        bias = None if self.bias is None else _double(self.bias)
        if self.folds_online:
            # Fast, in the precision that training forms run in.
            like = self.folded_kernel()
            kernel = _double(like)
        else:
            kernel, bias = self.branches_kernel_bias(bias)
            # A branch may have no parameter (an average), or those of norms.
            like = next(
                t for t in _named_tensors(self.branches).values() if t.dim() == 4
            )
        kernel, bias = self._with_norm(kernel, bias)
        return kernel.to(like), None if bias is None else bias.to(like)

    def _with_norm(
        self, kernel: Tensor, bias: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        if not self._fuses_norm:
            return kernel, bias
        return fuse_norm(kernel, bias, self.norm)

    def branches_kernel_bias(
        self, bias: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The kernel and bias of the branches, before :attr:`norm`, in float64.

        Args:
            bias (Tensor, optional): This conv's own bias, shape (O,), in float64.

        Returns:
            tuple[Tensor, Tensor | None]: Shapes (O, Ig, k, k) and (O,).
        """
        tensors = _named_tensors(self.branches)
        _check_is_whole(tensors.values())
        wide = {name: _double(tensor) for name, tensor in tensors.items()}
        return functional_call(self.branches, wide, ()), bias

    def switch_to_deploy(self) -> None:
        """Turns this module into the plain conv, in place.

        The fold is computed in float64 and stored in the dtype and on the device
        of the branches. Calling it again does nothing.

        Raises:
            TypeError: If ``kernel()`` or ``convolve()`` was overridden, which the
                deployed form does not call.
        """
        if self.deployed:
            return
        changed = self._changed_fold()
        if changed:
            raise TypeError(
                f'{type(self).__name__} has a {changed}() of its own, which the '
                'deployed form does not call: override _conv_forward() or forward(), '
                'which it does, or branches_kernel_bias() too'
            )
        hooked = [n for n, m in self.named_modules() if n and _falls_silent(n, m, self)]
        if hooked:
            warnings.warn(
                f'hooks on {", ".join(hooked)} of a {type(self).__name__} are not '
                'called any more: these modules are folded into the kernel. Put hooks '
                'on the conv itself',
                stacklevel=2,
            )
        # Outside of inference mode, whose tensors could never be trained again.
        with torch.inference_mode(False):
            kernel, bias = self.equivalent_kernel_bias()
            like = next(self.branches.parameters())
            own_bias = None if self.last_norms else self.bias
            is_trained = any(
                p.requires_grad for p in self.parameters() if p is not own_bias
            )
            is_bias_trained = is_trained if own_bias is None else own_bias.requires_grad
            marks = dict(vars(like)), {} if own_bias is None else dict(vars(own_bias))
            self._become_plain(bias is not None, like)
            vars(self.weight).update(marks[0])
            with torch.no_grad():
                self.weight.copy_(kernel)
                if bias is not None:
                    self.bias.copy_(bias)
            self.weight.requires_grad_(is_trained)
            if bias is not None:
                self.bias.requires_grad_(is_bias_trained)
                vars(self.bias).update(marks[1])

    def start_from(
        self,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        norm: Optional[Mapping[str, Tensor]] = None,
        start: Optional[str] = None,
    ) -> None:
        """Makes the training form compute what a plain conv computes.

        The branches keep their weights, and ``origin`` takes the rest: its weight is
        solved for in float64. In a deep linear kernel that is the ``origin`` of the
        last factor. Where branches have BatchNorms, that of ``origin`` becomes the
        norm of the plain conv, and the others' last weights and biases become zero.

        Args:
            weight (Tensor): The plain kernel, shape (O, Ig, k, k).
            bias (Tensor, optional): The plain bias, shape (O,). Defaults to None:
                zeros, where this conv has a bias.
            norm (Mapping[str, Tensor], optional): The state dict of the BatchNorm
                after the plain conv, where this conv has one. Defaults to None, which
                leaves the norm as it is.
            start (str, optional): ``'quiet'`` scales ``origin`` by one and every
                other branch by zero: the kernel moves about as far in a first step as
                that of a plain conv. ``'balanced'`` keeps the scales: all branches
                learn from the first step. Defaults to None, the conv's own
                :attr:`start`.

        Raises:
            ValueError: If the conv is deployed, shapes do not fit, or the branches
                cannot give this kernel: ``origin`` is missing or scaled by zero, or
                the chain of a deep linear kernel has too few channels.
        """
        _check_start(start or self.start)
        if self.deployed:
            raise ValueError('the conv is deployed: it has a weight, and no branches')
        if bias is not None and self.bias is None:
            raise ValueError('there is a bias, and the conv has none (bias=False)')
        for what, found, shape in (
            ('kernel', weight, self._kernel_shape),
            ('bias', bias, (self.out_channels,)),
        ):
            if found is not None and tuple(found.shape) != shape:
                raise ValueError(f'the {what} is of {tuple(found.shape)}, not {shape}')
        with torch.inference_mode(False), torch.no_grad():
            self._take_kernel(weight, norm, start or self.start)
            if self.bias is not None:
                self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias)
        self._forget()

    def _take_kernel(
        self, weight: Tensor, norm: Optional[Mapping[str, Tensor]], start: str
    ) -> None:
        if norm is not None:
            if self.norm is None:
                raise ValueError('there is a norm, and the conv has none')
            _load_norm(self.norm, norm)
        self.start_kernel_from(weight, start=start)

    def start_kernel_from(
        self, kernel: Tensor, start: Optional[str] = None, exactly: bool = True
    ) -> None:
        """As :meth:`start_from`, for the kernel alone.

        Args:
            kernel (Tensor): Shape (O, Ig, k, k).
            start (str, optional): As for :meth:`start_from`.
            exactly (bool): Whether an error is raised where the branches cannot give
                this kernel. Otherwise each output channel of theirs is multiplied by
                the factor that gives it the same norm. Defaults to True.
        """
        like = next(self.branches.parameters(), None)
        if like is None and exactly:
            raise ValueError(f'{type(self).__name__} has a fixed kernel')
        if like is None or like.is_meta:
            return
        _check_is_whole(self.branches.parameters())
        with torch.inference_mode(False), torch.no_grad():
            kernel = kernel.to(like.device, torch.float64)
            try:
                if not hasattr(self.branches, 'start_from'):
                    raise ValueError(
                        f'{type(self.branches).__name__} has no start_from'
                    )
                self.branches.start_from(kernel, start or self.start)
            except ValueError:
                if exactly:
                    raise
                if not hasattr(self.branches, 'rescale'):
                    return
                own = self.folded_kernel().double()
                norms = [k.flatten(1).norm(dim=1) for k in (kernel, own)]
                self.branches.rescale(norms[0] / norms[1].clamp_min(1e-12))
        self._forget()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, as the constructor does, those of norms included.

        Raises:
            ValueError: If pruning or a parametrization computes a weight of a branch.
        """
        if vars(self).get('deployed', True):  # Of a plain conv, as which it is built.
            super().reset_parameters()
            return
        self._draw_branches()
        if self.norm is not None and hasattr(self.norm, 'reset_parameters'):
            self.norm.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self._start_as_built()

    def _start_as_built(self) -> None:
        self._remember_fresh()
        if not self.keeps_own_init:
            nn.Conv2d.reset_parameters(self)
            self._remember_fresh()

    @torch.no_grad()
    def _draw_branches(self) -> None:
        """Gives the branches the values of fresh ones."""
        own, fresh = map(_named_tensors, (self.branches, self.build_branches()))
        if own.keys() != fresh.keys():
            raise ValueError(
                'its branches are computed from other tensors (pruned or parametrized)'
                ': call torch.nn.utils.prune.remove or '
                'torch.nn.utils.parametrize.remove_parametrizations before a reset'
            )
        _check_is_whole(own.values())
        for name, tensor in own.items():
            tensor.copy_(fresh[name])
        self._forget()

    def _remember_fresh(self) -> None:
        self._fresh = self._sums()

    def is_fresh(self) -> bool:
        """Whether the branches are as they were built or reset, to the last bit."""
        return self._fresh == self._sums()

    def redraw(self) -> None:
        """Makes the branches fresh, and takes no random numbers away from others."""
        with torch.random.fork_rng(devices=[]):
            self._draw_branches()
        self._remember_fresh()

    def _sums(self) -> list[float]:
        tensors = [p.detach() for p in self.branches.parameters()]
        # Fake ones have no sum.
        is_real = all(type(t) is Tensor and not t.is_meta for t in tensors)
        return [float(t.sum()) for t in tensors] if is_real else []

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script."""
        if not self.deployed:
            raise TypeError(
                'a training form is not scripted: call mmorepa.switch_to_deploy(model) '
                'first'
            )
        return self

    def check_is_whole(self) -> None:
        """Raises a RuntimeError if FSDP has sharded the branches."""
        _check_is_whole(_named_tensors(self.branches).values())

    def _changed_fold(self) -> Optional[str]:
        """The method of the training form alone that somebody has overridden."""
        for name in ('kernel', 'convolve'):
            if name in vars(self):
                return name
            names = (name, 'branches_kernel_bias', 'equivalent_kernel_bias')
            owner = next(c for c in type(self).__mro__ if vars(c).keys() & set(names))
            is_ours = owner.__module__.startswith('mmorepa.')
            if not is_ours and not vars(owner).keys() & set(names[1:]):
                return name
        return None

    @property
    def memory_format(self) -> torch.memory_format:
        """That of the kernel. It is not stored, since no file can hold it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def _kernel_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def keeps_own_init(self) -> bool:
        """Whether the fresh branches are left as they are by a network's init_weights.

        They are where a norm follows, which makes the scale of the kernel irrelevant:
        one of its own, or one of the network, where the conv has no bias.
        """
        return self.norm is not None or not self.conv_bias

    def train(self, mode: bool = True) -> 'ReparamConv2d':
        self._forget()
        return super().train(mode)

    def extra_repr(self) -> str:
        form = 'deployed' if self.deployed else 'training form'
        plain = nn.Conv2d.extra_repr(self)
        return f'{plain}, {form}'

    @property
    def last_norms(self) -> list[nn.Module]:
        """The normalisations whose sum is the output; none where they were folded."""
        return [] if self.norm is None else [self.norm]

    @property
    def _fuses_norm(self) -> bool:
        return is_fusible(self.norm)

    @property
    def _deployed_with_bias(self) -> bool:
        return self.conv_bias or self._fuses_norm

    def build_norm(self) -> Optional[nn.Module]:
        """Makes :attr:`norm` from ``norm_cfg``, or none."""
        if self.norm_cfg is None:
            return None
        return build_norm_layer(self.norm_cfg, self.out_channels)[1]

    def _become_training_form(self, with_branches: bool = True) -> None:
        """Gives this module fresh parameters of the training form."""
        self.deployed = False
        self._parameters.pop('weight', None)
        vars(self)['_parameters'] = _Parameters(self._parameters)
        self.bias = None
        if self.conv_bias:
            self.bias = nn.Parameter(torch.zeros(self.out_channels))
        self.norm = self.build_norm()
        self.branches = self.build_branches() if with_branches else None

    def _become_plain(self, with_bias: bool, like: Optional[Tensor] = None) -> None:
        """Gives this module parameters of the deployed form.

        They are initialised, or left for the caller to fill where ``like`` gives
        their device and dtype.
        """
        self.deployed = True
        del self.branches
        if self._fuses_norm:
            self.norm = None
        shape = (self.in_channels, self.out_channels, self.kernel_size)
        options = dict(groups=self.groups, bias=with_bias)
        if like is None:
            plain = nn.Conv2d(*shape, **options)
        else:
            # Uninitialised: a switch or a load takes no random numbers away from
            # the training that goes on around it.
            options.update(device=like.device, dtype=like.dtype)
            plain = skip_init(nn.Conv2d, *shape, **options)
        plain.to(memory_format=self.memory_format)
        others = {k: v for k, v in self._parameters.items() if k != 'bias'}
        vars(self)['_parameters'] = {}  # In the order of a plain conv.
        self.weight, self.bias = plain.weight, plain.bias
        self._parameters.update(others)
        self._forget()

    def _forget(self) -> None:
        """Drops what open scopes serve, since it has changed."""
        self.held = None
        if self._served is not None:
            self._served.clear()

    def __getstate__(self) -> dict:
        # A copy belongs to no scope.
        scopes = ('held', 'reduced_kernel', '_served')
        return {k: v for k, v in super().__getstate__().items() if k not in scopes}

    def __getattr__(self, name: str) -> Any:
        if name == 'weight' and not vars(self).get('deployed', True):
            return self._weight_of_training_form()
        return super().__getattr__(name)

    def _weight_of_training_form(self) -> Tensor:
        """The value of ``conv.weight``: the kernel, folded now."""
        kernel = self.kernel()
        return kernel if is_being_traced() else FoldedWeight.of(self, kernel)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'weight' and not vars(self).get('deployed', True):
            # `conv.weight += 1` ends with the weight that was written to.
            is_own = isinstance(value, FoldedWeight) and value.conv is self
            if is_own and value.whole is value and value.is_written:
                return
            raise TypeError(NO_PARAMETER)
        if name == 'qconfig' and value is not None and not self.deployed:
            raise TypeError(
                'a training form is not quantized: call '
                'mmorepa.switch_to_deploy(model) first, and train that with prepare_qat'
            )
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        # torch.nn.utils.prune would keep the weight under another name.
        if name.startswith('weight') and not vars(self).get('deployed', True):
            raise TypeError(NO_PARAMETER)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable, *args, **kwargs) -> 'ReparamConv2d':
        self._forget()
        # By Module.to(memory_format=...), which the branches are not asked for.
        probe = torch.empty(2, 2, 2, 2).to(memory_format=self.memory_format)
        is_last = fn(probe).is_contiguous(memory_format=torch.channels_last)
        if is_last is not self.channels_last:
            self.channels_last = is_last
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads; folds a training form where the module is deployed.

        MMEngine's loader and PyTorch's own both call this for every module.
        """
        if self.warns_of_flaws:
            warn_of_flaws(state_dict, prefix, error_msgs)
        own = f'{prefix}branches.weight'
        if own in state_dict and not self.deployed and not _is_plain(self.branches):
            # The training form of a PlainConv2d, whose kernel is a parameter.
            state_dict[f'{prefix}weight'] = state_dict.pop(own)
        has_branches = any(k.startswith(f'{prefix}branches.') for k in state_dict)
        dtypes = {k: v.dtype for k, v in state_dict.items() if k.startswith(prefix)}
        self.is_plain_start = False
        if self.deployed and has_branches:
            self._deploy_state_dict(state_dict, prefix)
        elif f'{prefix}weight' in state_dict and not has_branches:
            try:
                self._take_plain(state_dict, prefix, error_msgs)
            except ValueError as error:
                raise CheckpointError(
                    f"{type(self).__name__} cannot start from '{prefix}weight': {error}"
                ) from error
        if local_metadata.get('assign_to_params_buffers'):
            _keep_dtypes(state_dict, prefix, dtypes)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        self._forget()

    def _take_plain(
        self, state_dict: dict[str, Tensor], prefix: str, error_msgs: list[str]
    ) -> None:
        """Replaces the entries of a plain conv and its norm by this module's own."""
        weight = state_dict[f'{prefix}weight']
        bias = state_dict.get(f'{prefix}bias')
        start = f'{prefix}norm.'
        norm = {
            k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)
        }
        if self.deployed:
            if norm and self.norm is None and self.norm_cfg is not None:
                for name in norm:
                    del state_dict[start + name]
                own = build_norm_layer(self.norm_cfg, self.out_channels)[1]
                _load_norm(own, norm)
                bias = None if bias is None else _double(bias)
                kernel, bias = fuse_norm(_double(weight), bias, own)
                state_dict[f'{prefix}weight'] = kernel
                state_dict[f'{prefix}bias'] = bias
            return
        is_folded = self.norm is not None or (self.last_norms and not self.conv_bias)
        if bias is not None and not norm and is_folded:
            raise ValueError(
                'it has a bias, so the BatchNorm is folded into it (a deployed '
                'checkpoint), while the training form has a BatchNorm. Build the model '
                'with deploy=True: take the config that was written beside the '
                'checkpoint, NAME_config.py, or add --cfg-options '
                'model.backbone.deploy=True to the command line; or call '
                'mmorepa.switch_to_deploy on the model before loading. Or load the '
                'checkpoint that this one was made from'
            )
        if any(parameter.is_meta for parameter in self.branches.parameters()):
            raise ValueError(
                'its branches are on meta, and a start keeps what they were built '
                'with: build the model on a device that has memory'
            )
        del state_dict[f'{prefix}weight']
        if weight.shape != self._kernel_shape:
            # In PyTorch's words, and left to the loader: some go on with the rest.
            error_msgs.append(
                f'size mismatch for {prefix}weight: copying a param with shape '
                f'{weight.shape} from checkpoint, the shape in current model is '
                f'{torch.Size(self._kernel_shape)}.'
            )
            state_dict.update(self.branches.state_dict(prefix=f'{prefix}branches.'))
            return
        # What is missing or of another shape is reported as for any parameter.
        has_bias = bias is not None and bias.shape == (self.out_channels,)
        self.start_from(weight, bias if has_bias else self.bias, norm or None)
        self.is_plain_start = True
        for name in norm:
            del state_dict[start + name]
        for name, value in self.state_dict(prefix=prefix).items():
            is_left = name == f'{prefix}bias' and not has_bias
            if not is_left and (norm or not name.startswith(start)):
                state_dict[name] = value

    def _deploy_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Replaces this module's entries, a training form, by the deployed form."""
        own = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        twin = copy.deepcopy(self)
        with torch.random.fork_rng(devices=[]):
            twin._become_training_form()
        for module in twin.modules():  # A load within one that has warned.
            module.warns_of_flaws = False
        # In the widest dtype at hand, so that the result is rounded once.
        dtypes = [v.dtype for v in own.values() if v.is_floating_point()]
        twin.to(functools.reduce(torch.promote_types, dtypes, self.weight.dtype))
        try:
            twin.load_state_dict({k[len(prefix) :]: v for k, v in own.items()})
        except RuntimeError as error:
            raise CheckpointError(
                f"the training form under '{prefix}' cannot be folded while loading: "
                f'{error}'
            ) from error
        twin.switch_to_deploy()
        for name, value in twin.state_dict().items():
            state_dict[prefix + name] = value


def leaf_call(module: nn.Module, x: torch.fx.Proxy) -> Optional[torch.fx.Proxy]:
    """The node of a symbolic trace that calls a module as a whole.

    Returns:
        torch.fx.Proxy | None: None if the module is traced itself, or has a
        ``forward()`` that calls this one.
    """
    method = type(module).forward
    if (
        x.tracer.root is module
        or 'forward' in vars(module)
        or not (method.__module__.startswith('mmorepa.'))
    ):
        return None
    name = x.tracer.path_of_module(module)
    return x.tracer.create_proxy('call_module', name, (x,), {})


# Asked while a compiler traces, which would answer itself, and no.
@torch.compiler.assume_constant_result
def _is_exported_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _is_plain(branches: nn.Module) -> bool:
    return 'weight' in branches._parameters


def _check_start(start: str) -> None:
    if start not in STARTS:
        raise ValueError(f'start is one of {", ".join(STARTS)}, found {start!r}')


class _Parameters(dict):
    """Those of a training form, for wrappers that look for its weight there."""

    def __missing__(self, name: str) -> None:
        if name == 'weight':
            raise KeyError(NO_PARAMETER)
        raise KeyError(name)


def _keep_dtypes(
    state_dict: dict[str, Tensor], prefix: str, dtypes: dict[str, torch.dtype]
) -> None:
    """Gives what was computed of a checkpoint its dtypes: it becomes parameters."""
    kernels = [v for k, v in dtypes.items() if 'norm.' not in k and v.is_floating_point]
    for name, value in state_dict.items():
        if kernels and name.startswith(prefix) and value.is_floating_point():
            state_dict[name] = value.to(dtypes.get(name, kernels[0]))


def _load_norm(norm: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    found = norm.load_state_dict(state_dict, strict=False)
    missing = [key for key in found.missing_keys if key != 'num_batches_tracked']
    if missing or found.unexpected_keys:
        raise ValueError(
            f'its norm has {", ".join(state_dict)}, and {type(norm).__name__} has '
            f'{", ".join(norm.state_dict())}'
        )


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_sharded(tensors: Iterable[Tensor]) -> bool:
    # By fully_shard(), or by FullyShardedDataParallel, which flattens what it shards.
    return all(hasattr(t, 'full_tensor') or t.dim() < 2 for t in tensors)


def _check_is_whole(tensors: Iterable[Tensor]) -> None:
    if _is_sharded(tensors):
        raise RuntimeError(
            'the branches are sharded (FSDP) and each process has a part of them, '
            'which has no fold: gather them by torch.distributed.checkpoint.state_dict.'
            'get_model_state_dict with StateDictOptions(full_state_dict=True), and '
            'load that into a model without FSDP'
        )


def _falls_silent(name: str, module: nn.Module, conv: ReparamConv2d) -> bool:
    """Whether hooks of a module inside of a conv are not called when it is deployed."""
    is_folded = name.startswith('branches') or (name == 'norm' and conv._fuses_norm)
    # Those of pruning and its like make weights, which are in the fold.
    return is_folded and any(
        not type(hook).__module__.startswith('torch.nn.utils')
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


def _must_run(module: nn.Module) -> bool:
    return module.training or bool(module._forward_hooks or module._forward_pre_hooks)


def is_fusible(norm: Optional[nn.Module]) -> bool:
    """Whether a normalisation layer is linear in eval mode: BatchNorm, as a rule."""
    # Without running statistics the normalisation depends on the batch.
    return isinstance(norm, _BatchNorm) and norm.track_running_stats


def fuse_norm(
    kernel: Tensor, bias: Optional[Tensor], norm: _BatchNorm
) -> tuple[Tensor, Tensor]:
    """A BatchNorm layer folded into the float64 conv before it.

    Args:
        kernel (Tensor): Shape (O, Ig, k, k), float64.
        bias (Tensor, optional): Shape (O,), float64.
        norm (nn.Module): A layer that :func:`is_fusible`.

    Returns:
        tuple[Tensor, Tensor]: Kernel and bias, in float64.
    """
    return fuse_bn(
        kernel,
        bias,
        _double(norm.running_mean),
        _double(norm.running_var),
        _double(norm.weight) if norm.affine else None,
        _double(norm.bias) if norm.affine else None,
        norm.eps,
    )


def _check_has_fold(
    name: str, kernel_size: IntPair, padding: Union[IntPair, str], padding_mode: str
) -> None:
    height, width, *more = _pair(kernel_size)
    if more:
        raise ValueError(f'{name} is a 2D conv; found kernel_size={kernel_size}')
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
    if not isinstance(padding, str) and min(_pair(padding)) < 0:
        raise ValueError(f'{name} takes padding >= 0, found padding={padding}')


def _double(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    device = 'cpu' if tensor.device.type == 'mps' else tensor.device
    return tensor.detach().to(device, torch.float64)
