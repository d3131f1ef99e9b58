"""Switches whole models from training form to deployed form."""

import re
from collections.abc import Iterator
from typing import Any, Optional, Union

import torch
import torch.fx
from torch import Tensor, nn

from .changes import check_foldable
from .conv import ReparamConv2d
from .folding import check_is_whole
from .references import parallel_wrapper, replace_modules

_OF_BRANCHES = re.compile(
    r'(^|[._])branches[._](scale|weight|factors|origin|pointwise|average|identity)'
)
_OF_CONVS = vars(nn.Conv2d(1, 1, 1, device='meta')).keys()
# What this package sets on training forms after they are built.
_SET_LATER = {'training_scope', 'evaluation_scope', 'channels_last', 'is_plain_start'}
_SET_LATER |= {'warns_of_flaws', 'fixed_geometry', '_built', '_fresh'}


def switch_to_deploy(module: nn.Module) -> nn.Module:
    """Switches every re-parameterised conv inside ``module`` to its plain form.

    A :class:`torch.nn.Conv2d` takes the place of each conv, or a :class:`ConvAct2d`
    where an activation belongs to it. Attributes that were set on the conv go along. A
    conv keeps its class if its norm cannot be folded (GroupNorm and the like), if it
    has hooks, methods, parameters, buffers or modules of its own, or if it is
    ``module`` itself. The keys of the state dict are those of a model that was built
    with ``deploy=True``.

    Args:
        module (nn.Module): A layer, a backbone, or a whole model, changed in place and
            returned.

    Raises:
        RuntimeError: If a wrapper for data parallelism around it is in training mode
            (one in eval mode may be tested after this, and not trained), or if it is a
            program of the operations of branches, by ``torch.export`` for example.
    """
    _check_traces(module)
    convs = {conv: name for name, conv in outermost(module)}
    forms = [conv for conv in convs if not conv.deployed]
    wrapper = parallel_wrapper(module) if forms else None
    if wrapper is not None:
        for conv in forms:
            check_is_whole(list(conv.parameters()))
        _refuse_training(wrapper)
        wrapper.register_forward_pre_hook(_refuse_training)
    for conv in forms:  # All of them, before the first one is changed.
        check_foldable(conv)
    for conv in convs:
        conv.switch_to_deploy()
    if not isinstance(module, ReparamConv2d):
        replace_modules(module, {conv: _plain(conv) for conv in convs})
    return module


def _check_traces(model: nn.Module) -> None:
    for name, graph in model.named_modules():
        if not isinstance(graph, torch.fx.GraphModule):
            continue
        for node in graph.graph.nodes:
            is_part = node.op in ('get_attr', 'call_module')
            if is_part and _OF_BRANCHES.search(node.target):
                raise RuntimeError(
                    f'{name or type(graph).__name__} is a program in which the '
                    f'operations of branches are traced ({node.target}): call '
                    'mmorepa.switch_to_deploy(model) before it is traced or exported'
                )


def _refuse_training(wrapper: nn.Module, *args) -> None:
    if wrapper.training and torch.is_grad_enabled():
        raise RuntimeError(
            f'{type(wrapper).__name__} averages the gradients of branches, and would '
            'not those of a model that is deployed inside of it: deploy the model '
            'first, and wrap it again'
        )


def _plain(deployed: ReparamConv2d) -> nn.Module:
    act = deployed.act
    is_more = (
        deployed.norm is not None
        or has_hooks(deployed)
        or overrides(deployed)
        or registered(deployed) - {'weight', 'bias', 'norm', 'act'}
        or (act is not None and next(act.parameters(), None) is not None)
    )
    if is_more:
        return deployed
    conv = nn.Conv2d(1, 1, 1, device='meta')
    attributes = {k: v for k, v in vars(deployed).items() if k in _OF_CONVS}
    attributes.update(user_attributes(deployed), _modules={}, _parameters={})
    vars(conv).update(attributes)
    conv.weight, conv.bias = deployed.weight, deployed.bias
    return conv if act is None else ConvAct2d(conv, act).train(deployed.training)


def user_attributes(conv: nn.Conv2d) -> dict[str, Any]:
    """What somebody has set on a conv, plain or not, besides what its class sets."""
    known = set(_OF_CONVS)
    if isinstance(conv, ReparamConv2d):
        known |= conv._built | _SET_LATER
    return {name: value for name, value in vars(conv).items() if name not in known}


def registered(conv: nn.Module) -> set[str]:
    """The names of the parameters, buffers and modules of a conv."""
    return {*conv._parameters, *conv._buffers, *conv._modules}


def overrides(conv: nn.Conv2d) -> list[str]:
    """The methods by which a conv computes something else than its class."""
    names = [name for name, value in user_attributes(conv).items() if callable(value)]
    if isinstance(conv, ReparamConv2d):
        for name in ('forward', '_conv_forward', '__call__'):
            if getattr(type(conv), name) is not getattr(ReparamConv2d, name):
                names.append(name)
    return names


def has_hooks(owner: Union[nn.Module, Tensor]) -> bool:
    """Whether a module or a parameter has hooks."""
    names = (*vars(owner), '_backward_hooks', '_post_accumulate_grad_hooks')
    return any(getattr(owner, n, None) for n in names if n.endswith('_hooks'))


class ConvAct2d(nn.Sequential):
    """A plain conv and its activation, with the state dict of the conv alone."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = act
        self._register_state_dict_hook(_without_conv)

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Optional[Tensor]:
        return self.conv.bias

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args
    ) -> None:
        for name in ('weight', 'bias'):
            if f'{prefix}{name}' in state_dict:
                state_dict[f'{prefix}conv.{name}'] = state_dict.pop(f'{prefix}{name}')
        super()._load_from_state_dict(state_dict, prefix, *args)


def _without_conv(
    module: ConvAct2d, state_dict: dict[str, Tensor], prefix: str, metadata: dict
) -> None:
    for name in ('weight', 'bias'):
        if f'{prefix}conv.{name}' in state_dict:
            state_dict[f'{prefix}{name}'] = state_dict.pop(f'{prefix}conv.{name}')


def is_switchable(module: nn.Module) -> bool:
    """Whether :func:`switch_to_deploy` would fold something in a module."""
    return any(not conv.deployed for _, conv in outermost(module))


def outermost(
    module: nn.Module, kind: type[nn.Module] = ReparamConv2d, name: str = ''
) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a type that are inside no other one of it, with their names.

    A branch that is itself a re-parameterised conv counts within its block.

    Args:
        module (nn.Module): Any module.
        kind (type[nn.Module]): Defaults to :class:`ReparamConv2d`.
        name (str): That of ``module``. Defaults to ``''``, the model.
    """
    if isinstance(module, kind):
        yield name, module
        return
    for child_name, child in module.named_children():
        full_name = f'{name}.{child_name}' if name else child_name
        yield from outermost(child, kind, full_name)
