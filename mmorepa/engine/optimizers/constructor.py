"""Learning rates and weight decays by the role of a parameter."""

import logging
from collections import Counter
from functools import partial
from typing import Optional, Union

from mmcv.cnn import is_norm
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ...backbones import StagedBackbone
from ...layers import DeepLinearKernel, OREPAKernel, OREPAPointwiseKernel, ReparamConv2d
from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .choices import FOLDED, choose_memory_format, log_choices, wrapper_class
from .fused_update import match_memory, start_momentum, with_fused_update


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OREPAOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with multipliers for parameters of OREPA networks.

    All options of MMEngine's ``paramwise_cfg`` keep their meaning. The following
    options are added. They multiply the results of the other options, unlike
    ``custom_keys``, where a match switches the other rules off:

    - ``norm_bias_lr_mult`` (float): Learning rate of the biases of normalisation
      layers. ``bias_lr_mult`` does not apply to them.
    - ``stem_lr_mult`` (float): Learning rate of all parameters in a deep linear stem.
      Other stems of this package's backbones keep their rate, and the log says so.
    - ``stem_keys`` (list[str]): Names of the modules that are the stem, such as
      ``['backbone.conv1']``. By default the deep linear stems of our backbones.
    - ``scale_lr_mult``, ``scale_decay_mult`` (float): Learning rate and weight decay
      of the scaling vectors.
    - ``branch_decay_mult`` (float): Weight decay of all parameters that are folded into
      kernels, with the scaling vectors. Set it to 0 for
      :class:`mmorepa.engine.EquivalentKernelDecayHook`.

    Two defaults depend on the model. Options beside the type of the wrapper change
    them:

    - If there are kernels to fold, ``OptimWrapper``, ``AmpOptimWrapper`` and
      ``BFloat16OptimWrapper`` become their folded forms, such as
      :class:`FoldedOptimWrapper`, which gets the option ``capture``. ``folded=False``
      prevents this.
    - ResNets and RepVGGs that are not wrapped run with channels last on a CPU, and in
      mixed precision on a GPU, see :func:`mmorepa.set_channels_last`.
      ``channels_last=True`` or ``False`` chooses for any model.

    Parameters with the same settings share one group, which PyTorch's optimizers update
    in one fused loop if possible. The log lists the groups.

    Raises:
        ValueError: If an option is not known or contradicts another, ``stem_keys`` has
            a name that is no module's, a multiplier fits no parameter that is trained,
            or modules share a parameter and ``bypass_duplicate`` is not set.

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
        self.capture = optim_wrapper_cfg.pop('capture', False)
        self._check_options(wrapper_class(optim_wrapper_cfg))
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the optimizer and its wrapper for a model, wrapped or not."""
        self.optimizer_cfg = with_fused_update(self.optimizer_cfg, model)
        kernels = sum(
            isinstance(module, ReparamConv2d) and module.is_held_in_training
            for module in model.modules()
        )
        kind = wrapper_class(self.optim_wrapper_cfg)
        if self.folded and kernels:
            kind = FOLDED.get(kind, kind)
            if kind in FOLDED.values():
                self.optim_wrapper_cfg.update(type=kind, capture=self.capture)
        is_half = issubclass(kind or object, (AmpOptimWrapper, BFloat16OptimWrapper))
        parts = choose_memory_format(model, self.channels_last, is_half)
        wrapper = super().__call__(model)
        start_momentum(wrapper.optimizer)
        wrapper.optimizer.register_load_state_dict_post_hook(
            partial(match_memory, model)
        )
        log_choices(wrapper, model, kernels, parts)
        return wrapper

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: Optional[Union[int, float]] = None,
    ) -> None:
        """Adds the parameters of a module to ``params``, as the base class does."""
        if prefix:  # The base class calls this method for every child.
            super().add_params(params, module, prefix, is_dcn_module)
            return
        singles: list[dict] = []
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel(logging.ERROR)  # The base class logs every tensor.
        try:
            super().add_params(singles, module)
        finally:
            logger.setLevel(level)
        counts = Counter(single['params'][0] for single in singles)
        for name, param in module.named_parameters():
            if counts[param] > 1:  # It would step several times.
                raise ValueError(
                    f'several modules share the parameter {name!r}, which the '
                    'optimizer may hold once: set bypass_duplicate=True in '
                    'paramwise_cfg'
                )
        for option, (setting, choose) in _MULTIPLIERS.items():
            if option in self.paramwise_cfg:
                chosen = choose(module, self.paramwise_cfg)
                if chosen is not None:
                    self._multiply(singles, option, setting, chosen)
        groups = _merge(singles)
        params.extend(groups)
        self._log_groups(groups, module)

    def _check_options(self, kind: Optional[type]) -> None:
        if self.folded not in (True, False):
            raise ValueError(f'folded is True or False, found {self.folded!r}')
        if self.channels_last not in (True, False, 'auto'):
            raise ValueError(
                f"channels_last is True, False or 'auto', found {self.channels_last!r}"
            )
        if not self.folded and kind in FOLDED.values():
            raise ValueError(
                f'folded=False contradicts type={kind.__name__!r}; take '
                f'{kind.__name__.removeprefix("Folded")!r}'
            )
        if self.capture and not self.folded:
            raise ValueError(
                'capture records the folds of folded training: folded=False has none'
            )
        if self.capture and kind not in (None, *FOLDED, *FOLDED.values()):
            raise ValueError(
                f'capture records the folds of folded training: {kind.__name__!r} has '
                f'no folded form; take {", ".join(known.__name__ for known in FOLDED)}'
            )

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        known = {*_MMENGINE_OPTIONS, *_MULTIPLIERS, 'stem_keys'}
        unknown = self.paramwise_cfg.keys() - known
        if unknown:
            # MMEngine would ignore it without a warning.
            raise ValueError(
                f'paramwise_cfg has no option {", ".join(sorted(unknown))}; it knows '
                f'{", ".join(sorted(known))}'
            )

    def _multiply(
        self, singles: list[dict], option: str, setting: str, chosen: list[nn.Parameter]
    ) -> None:
        base = self.base_lr if setting == 'lr' else self.base_wd
        if base is None:
            raise ValueError(f'{option} needs {setting!r} in the optimizer config')
        factor, parameters = self.paramwise_cfg[option], set(chosen)
        matches = [s for s in singles if s['params'][0] in parameters]
        if not matches:
            raise ValueError(
                f'{option}={factor} has no effect: the model has nothing that it is '
                'meant for, or it is frozen (frozen_stages)'
            )
        for single in matches:
            single[setting] = single.get(setting, base) * factor

    def _log_groups(self, groups: list[dict], module: nn.Module) -> None:
        names = {param: name for name, param in module.named_parameters()}
        lines = [
            f'- {len(group["params"])} tensors from {names[group["params"][0]]}: '
            f'lr {group.get("lr", self.base_lr)}, '
            f'weight decay {group.get("weight_decay", self.base_wd)}'
            for group in groups
        ]
        frozen = sum(not param.requires_grad for param in module.parameters())
        MMLogger.get_current_instance().info(
            f'Parameter groups ({frozen} tensors are frozen and in none):\n'
            + '\n'.join(lines)
        )


def _merge(singles: list[dict]) -> list[dict]:
    """Merges groups of one parameter each if all their settings are the same."""
    groups: dict[tuple, dict] = {}
    for single in singles:
        settings = {k: v for k, v in single.items() if k != 'params'}
        key = tuple(sorted((k, repr(v)) for k, v in settings.items()))
        group = groups.setdefault(key, dict(params=[], **settings))
        group['params'].extend(single['params'])
    return list(groups.values())


def _norm_biases(module: nn.Module, options: dict) -> list[nn.Parameter]:
    norms = (m for m in module.modules() if is_norm(m))
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
        backbones = [m for m in module.modules() if isinstance(m, StagedBackbone)]
        stems = [b.stem for b in backbones if _is_deep_linear(b.stem)]
        if backbones and not stems:
            # The same config with block='plain' keeps the rate of its other layers.
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
    """The parameters that kernels are folded from, without the norms of branches."""
    return [
        param
        for conv in module.modules()
        if isinstance(conv, ReparamConv2d) and not conv.deployed
        for part in conv.branches.modules()
        if not is_norm(part)
        for param in part.parameters(recurse=False)
    ]


# For each option, the setting that it multiplies, and a function for its parameters.
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
