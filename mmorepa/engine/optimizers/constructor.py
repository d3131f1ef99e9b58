"""Learning rates and weight decays by the role of a parameter."""

import logging
from collections import Counter
from functools import partial
from typing import Optional, Union

import torch
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import (
    AmpOptimWrapper,
    DefaultOptimWrapperConstructor,
    OptimWrapper,
)
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    Registry,
)
from torch import nn
from torch.nn import GroupNorm, LayerNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import SGD, Optimizer

from ...backbones import StagedBackbone
from ...functional import compiled
from ...layers import (
    DeepLinearKernel,
    OREPAKernel,
    OREPAPointwiseKernel,
    ReparamConv2d,
    faster_in_channels_last,
    outermost,
    set_channels_last,
)
from ...layers.exchange import has_branches
from ...utils.tables import format_table
from ..distributed import FoldedDistributedDataParallel
from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .folded_optim_wrapper import (
    FoldedAmpOptimWrapper,
    FoldedBFloat16OptimWrapper,
    FoldedOptimWrapper,
)

_FOLDED = {
    OptimWrapper: FoldedOptimWrapper,
    AmpOptimWrapper: FoldedAmpOptimWrapper,
    BFloat16OptimWrapper: FoldedBFloat16OptimWrapper,
}
_NORMS = (_BatchNorm, _InstanceNorm, GroupNorm, LayerNorm)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OREPAOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with multipliers for parameters of OREPA networks.

    All options of MMEngine's ``paramwise_cfg`` keep their meaning. These are
    added, and multiply what the others give (in ``custom_keys``, a match would
    switch the other rules off):

    - ``norm_bias_lr_mult`` (float): Learning rate of the biases of normalisation
      layers, which ``bias_lr_mult`` leaves out.
    - ``stem_lr_mult`` (float): Learning rate of everything in the stem, its
      BatchNorm and scaling vectors included. It is for deep linear stems: another
      stem of this package's backbones keeps its learning rate, and the log says so.
    - ``stem_keys`` (list[str]): Names of the modules that are the stem, such as
      ``['backbone.conv1']``, of any kind. By default the deep linear stems of this
      package's backbones.
    - ``scale_lr_mult``, ``scale_decay_mult`` (float): Learning rate and weight decay
      of the scaling vectors.
    - ``branch_decay_mult`` (float): Weight decay of all that is folded into kernels,
      scaling vectors included; 0 goes with
      :class:`mmorepa.engine.EquivalentKernelDecayHook`.

    Networks with kernels to fold train folded: a wrapper of type ``OptimWrapper``,
    ``AmpOptimWrapper`` or ``BFloat16OptimWrapper`` becomes its folded form, such as
    :class:`FoldedOptimWrapper`, unless ``folded=False`` stands beside its type.

    Convs run with channels last in memory where that was measured to be faster: ResNets
    and RepVGGs, as whole models or as backbones, on a CPU, and in mixed precision on a
    GPU, unless a wrapper is around them. ``channels_last=False`` beside the type leaves
    the default order, ``channels_last=True`` takes the whole model, see
    :func:`mmorepa.set_channels_last`.

    Parameters with the same settings share one group, and an optimizer of PyTorch's
    updates them in one fused loop where it can, unless its config says ``fused`` or
    ``foreach``; the groups are logged as one table.

    Raises:
        ValueError: If an option is not known, a multiplier fits no parameter that is
            trained, or modules share a parameter and ``bypass_duplicate`` is not set.

    Examples:
        >>> # The paper's recipe: biases learn at twice the rate, without decay.
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
        ...     constructor='OREPAOptimWrapperConstructor',
        ...     paramwise_cfg=dict(
        ...         norm_decay_mult=0.0,
        ...         bias_decay_mult=0.0,
        ...         bias_lr_mult=2.0,
        ...         norm_bias_lr_mult=2.0,
        ...     ),
        ... )
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None
    ) -> None:
        optim_wrapper_cfg = dict(optim_wrapper_cfg)
        self.folded = optim_wrapper_cfg.pop('folded', True)
        self.channels_last = optim_wrapper_cfg.pop('channels_last', 'auto')
        if self.channels_last not in (True, False, 'auto'):
            raise ValueError(
                f"channels_last is True, False or 'auto', found {self.channels_last!r}"
            )
        kind = _class_of(optim_wrapper_cfg.get('type'), OPTIM_WRAPPERS)
        if not self.folded and kind in _FOLDED.values():
            raise ValueError(
                f'folded=False contradicts type={kind.__name__!r}; take '
                f'{kind.__name__.removeprefix("Folded")!r}'
            )
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer and its wrapper.

        Args:
            model (nn.Module): The model, wrapped or not.

        Returns:
            OptimWrapper: Of the type that the config asks for.
        """
        if not {'fused', 'foreach'} & self.optimizer_cfg.keys():
            fused = {**self.optimizer_cfg, 'fused': True}
            if _can_be_built(fused, model):
                self.optimizer_cfg = fused
        kind = self.optim_wrapper_cfg.get('type', 'OptimWrapper')
        convs = [m for m in model.modules() if isinstance(m, ReparamConv2d)]
        held = sum(conv.is_held_in_training for conv in convs)
        if self.folded and held:
            kind = _FOLDED.get(_class_of(kind, OPTIM_WRAPPERS), kind)
            self.optim_wrapper_cfg['type'] = kind
        parts = self._set_channels_last(model, _class_of(kind, OPTIM_WRAPPERS))
        wrapper = super().__call__(model)
        _give_all_a_momentum(wrapper.optimizer)
        wrapper.optimizer.register_load_state_dict_post_hook(
            partial(_reorder_states, model)
        )
        self._log_choices(wrapper, held, model, parts)
        return wrapper

    def _set_channels_last(
        self, model: nn.Module, kind: Optional[type]
    ) -> list[nn.Module]:
        """Chooses the order of memory, and returns what has channels last."""
        if any(map(is_model_wrapper, model.modules())):
            # What reduces gradients has remembered their order.
            if self.channels_last is True:
                raise ValueError(
                    'channels_last=True comes too late for a model that is wrapped: '
                    'call mmorepa.set_channels_last(model) before the wrapper'
                )
            return []
        half = (AmpOptimWrapper, BFloat16OptimWrapper)
        is_half = isinstance(kind, type) and issubclass(kind, half)
        if self.channels_last == 'auto':
            is_cpu = next(model.parameters()).device.type == 'cpu'
            parts = faster_in_channels_last(model) if is_cpu or is_half else []
        else:
            parts = [model] if self.channels_last else []
            set_channels_last(model, self.channels_last)
        for part in parts:
            set_channels_last(part)
        return parts

    def _log_choices(
        self,
        wrapper: OptimWrapper,
        held: int,
        model: nn.Module,
        parts: list[nn.Module],
    ) -> None:
        """Logs in one line how the model will be trained."""
        if not held:
            way = 'no kernels to fold'
        elif not isinstance(wrapper, tuple(_FOLDED.values())):
            way = f'{held} kernels folded online, at every forward pass'
        elif is_model_wrapper(model) and not isinstance(
            model, FoldedDistributedDataParallel
        ):
            way = f'{held} kernels folded online, because of {type(model).__name__}'
        else:
            way = f'{held} kernels folded outside of the graph'
        device = next(model.parameters()).device.type
        folds = 'compiled for this CPU' if compiled.is_available() else 'not compiled'
        if device != 'cpu':
            folds = f'as operations on {device}'
        update = 'fused' if wrapper.optimizer.defaults.get('fused') else 'not fused'
        convs = [conv for _, conv in outermost(model, _ConvNd)]
        turned = sum(has_branches(conv) for conv in convs)
        twice = sum(getattr(conv, 'has_second_norm', False) for conv in convs)
        names = ', '.join(type(part).__name__ for part in parts) or 'nothing'
        second = f'; the norms of {twice} are followed by another one' if twice else ''
        logger = MMLogger.get_current_instance()
        if not turned and any(getattr(conv, 'deployed', False) for conv in convs):
            logger.warning(
                f'{type(model).__name__} trains in its deployed form, without '
                'branches: build it without deploy=True to train it re-parameterised'
            )
        logger.info(
            f'{type(wrapper).__name__}: {way} (folds {folds}; '
            f'{type(wrapper.optimizer).__name__} {update}; channels last in '
            f'{names}); {turned} convs of the '
            f'model are re-parameterised, {len(convs) - turned} are not{second}'
        )

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: Optional[Union[int, float]] = None,
    ) -> None:
        """Adds the parameters of ``module`` to ``params``, in groups.

        Args:
            params (list[dict]): Parameter groups, extended in place.
            module (nn.Module): The module.
            prefix (str): Its name within the model. Defaults to ``''``, the model.
            is_dcn_module (int | float | None): As in the base class.
        """
        if prefix:  # The base class calls this for every child.
            super().add_params(params, module, prefix, is_dcn_module)
            return
        singles: list[dict] = []
        logger = MMLogger.get_current_instance()
        logger.addFilter(_is_worth_a_line)
        try:
            super().add_params(singles, module)
        finally:
            logger.removeFilter(_is_worth_a_line)
        _check_none_twice(singles, module)
        for option, (setting, choose) in _MULTIPLIERS.items():
            if option in self.paramwise_cfg:
                chosen = choose(module, self.paramwise_cfg)
                if chosen is not None:
                    self._multiply(singles, option, setting, chosen)
        groups = self._merge(singles)
        params.extend(groups)
        self._log(groups, module)

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = self.paramwise_cfg.keys() - _MMENGINE_OPTIONS - _MULTIPLIERS.keys()
        unknown -= {'stem_keys'}
        if unknown:
            # MMEngine would pass over it in silence.
            raise ValueError(
                f'paramwise_cfg has no option {", ".join(sorted(unknown))}; it knows '
                f'{", ".join(sorted({*_MMENGINE_OPTIONS, *_MULTIPLIERS, "stem_keys"}))}'
            )
        keys = self.paramwise_cfg.get('stem_keys')
        if isinstance(keys, str):  # Or else its letters would be the names.
            raise ValueError(f'stem_keys is a list of names, found {keys!r}')

    def _multiply(
        self,
        singles: list[dict],
        option: str,
        setting: str,
        chosen: list[nn.Parameter],
    ) -> None:
        base = self.base_lr if setting == 'lr' else self.base_wd
        if base is None:
            raise ValueError(f'{option} needs {setting!r} in the optimizer config')
        identities = {id(param) for param in chosen}
        matches = [s for s in singles if id(s['params'][0]) in identities]
        if not matches:
            raise ValueError(
                f'{option}={self.paramwise_cfg[option]} has no effect: '
                + (
                    'all that it is meant for is frozen (frozen_stages, requires_grad)'
                    if chosen
                    else 'the model has nothing that it is meant for'
                )
            )
        for single in matches:
            single[setting] = single.get(setting, base) * self.paramwise_cfg[option]

    @staticmethod
    def _merge(singles: list[dict]) -> list[dict]:
        groups: dict[tuple, dict] = {}
        for single in singles:
            settings = {k: v for k, v in single.items() if k != 'params'}
            key = tuple(sorted((k, repr(v)) for k, v in settings.items()))
            group = groups.setdefault(key, dict(params=[], **settings))
            group['params'].extend(single['params'])
        return list(groups.values())

    def _log(self, groups: list[dict], module: nn.Module) -> None:
        names = {id(param): name for name, param in module.named_parameters()}
        rows = [
            (
                names[id(group['params'][0])],
                f'{len(group["params"])}',
                f'{sum(p.numel() for p in group["params"]):,}',
                f'{group.get("lr", self.base_lr)}',
                f'{group.get("weight_decay", self.base_wd)}',
            )
            for group in groups
        ]
        frozen = sum(not param.requires_grad for param in module.parameters())
        headers = ('group, by its first', 'tensors', 'parameters', 'lr', 'weight decay')
        MMLogger.get_current_instance().info(
            f'Parameter groups ({frozen} tensors are frozen and in none):\n'
            f'{format_table(headers, rows)}'
        )


def _class_of(kind: Union[str, type], registry: Registry) -> Optional[type]:
    return registry.get(kind) if isinstance(kind, str) else kind


def _can_be_built(config: dict, model: nn.Module) -> bool:
    """Whether a fused optimizer of PyTorch's takes these options and parameters."""
    options = dict(config)
    optimizer = _class_of(options.pop('type'), OPTIMIZERS)
    if optimizer is None or not optimizer.__module__.startswith('torch.optim.'):
        return False
    trained = [param for param in model.parameters() if param.requires_grad]
    try:
        optimizer(trained, **options)
    except (TypeError, ValueError, RuntimeError):
        # It has no such update, or not with other options, in this version or on this
        # device; or nothing is trained.
        return False
    return True


def _give_all_a_momentum(optimizer: Optimizer) -> None:
    """Gives every parameter a momentum buffer where PyTorch's fused SGD needs it.

    It fails unless all parameters of a group have a buffer, or none has, as where one
    had no gradient before. A buffer of zeros is the same start: ``0.9 * 0 + g`` is
    ``g``.
    """
    for group in optimizer.param_groups:
        is_safe = group.get('momentum') and not group.get('dampening')
        if type(optimizer) is SGD and group.get('fused') and is_safe:
            for param in group['params']:
                optimizer.state[param]['momentum_buffer'] = torch.zeros_like(param)


def _reorder_states(model: nn.Module, optimizer: Optimizer) -> None:
    """Gives loaded states the order of memory that their parameters have.

    A fused update takes both for memory of one order, and checkpoints bring another
    one: that of an earlier version, or of a model without channels last.
    """
    reorder = {
        kernel.get_parameter(name): partial(kernel.branch_sum.from_former, name)
        for kernel in model.modules()
        if isinstance(kernel, OREPAKernel)
        for name in kernel.branch_sum.roles.keys() & kernel._parameters.keys()
    }
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue
            value = reorder.get(param, lambda x: x)(value)
            if value.shape == param.shape and value.stride() != param.stride():
                value = torch.empty_like(param, dtype=value.dtype).copy_(value)
            state[name] = value


def _norm_biases(module: nn.Module, options: dict) -> list[nn.Parameter]:
    norms = (m for m in module.modules() if isinstance(m, _NORMS))
    return [norm.bias for norm in norms if getattr(norm, 'bias', None) is not None]


def _stems(module: nn.Module, options: dict) -> Optional[list[nn.Parameter]]:
    """The parameters of the stems; None if no stem is deep linear."""
    if 'stem_keys' in options:
        modules = dict(module.named_modules())
        missing = [key for key in options['stem_keys'] if key not in modules]
        if missing:
            raise ValueError(
                f'stem_keys names {", ".join(missing)}, which is no module of the model'
            )
        stems = [modules[key] for key in options['stem_keys']]
    else:
        every = [m.stem for m in module.modules() if isinstance(m, StagedBackbone)]
        stems = [stem for stem in every if _is_deep_linear(stem)]
        if every and not stems:
            # Or a config would train its plain twin, block='plain', at another rate.
            MMLogger.get_current_instance().info(
                f'stem_lr_mult={options["stem_lr_mult"]} is not applied: the stem is '
                'not deep linear (stem_keys names any other)'
            )
            return None
    return [param for stem in stems for param in stem.parameters()]


def _is_deep_linear(stem: nn.Module) -> bool:
    return any(isinstance(part, DeepLinearKernel) for part in stem.modules())


def _scales(module: nn.Module, options: dict) -> list[nn.Parameter]:
    kernels = (OREPAKernel, OREPAPointwiseKernel)
    return [m.scale for m in module.modules() if isinstance(m, kernels)]


def _branches(module: nn.Module, options: dict) -> list[nn.Parameter]:
    """The parameters that kernels are folded from, without norms in branches."""
    return [
        param
        for conv in module.modules()
        if isinstance(conv, ReparamConv2d) and not conv.deployed
        for part in conv.branches.modules()
        if not isinstance(part, _NORMS)
        for param in part.parameters(recurse=False)
    ]


# Option: the setting that it multiplies, and which parameters'.
_MULTIPLIERS = {
    'norm_bias_lr_mult': ('lr', _norm_biases),
    'stem_lr_mult': ('lr', _stems),
    'scale_lr_mult': ('lr', _scales),
    'scale_decay_mult': ('weight_decay', _scales),
    'branch_decay_mult': ('weight_decay', _branches),
}
_MMENGINE_OPTIONS = {
    'bias_decay_mult',
    'bias_lr_mult',
    'bypass_duplicate',
    'custom_keys',
    'dcn_offset_lr_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'norm_decay_mult',
}


def _check_none_twice(singles: list[dict], module: nn.Module) -> None:
    """Raises for a parameter that is twice in a group, which would step twice."""
    counts = Counter(single['params'][0] for single in singles)
    for name, param in module.named_parameters():
        if counts[param] > 1:
            raise ValueError(
                f'several modules share the parameter {name!r}, which the optimizer '
                'may hold once: set bypass_duplicate=True in paramwise_cfg'
            )


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether a line is not one that the base class logs for every tensor."""
    message = record.getMessage()
    return not (
        message.startswith('paramwise_options -- ')
        or 'is skipped since its requires_grad=' in message
    )
