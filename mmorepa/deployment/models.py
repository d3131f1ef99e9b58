"""Builds deployed models from configs and checkpoints of either form."""

import copy
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..backbones import StagedBackbone
from ..converters import load_strictly, load_training_form
from ..layers import ReparamConv2d, is_switchable, switch_to_deploy
from ..runs import build_model
from ..utils.errors import CheckpointError


def loaded_by_config(cfg: Config, state_dict: dict) -> tuple[Config, nn.Module]:
    """The config of the deployed form, and its model with these deployed weights.

    Backbones and every ``conv_cfg`` of this package get ``deploy=True``. Modules of the
    type ``Reparameterized`` are replaced by the module that they contain. Raises a
    ValueError if code builds convs of this package without a config, or if the weights
    do not fit.
    """
    cfg = copy.deepcopy(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    cfg.model = _deployed(cfg.model)
    model = build_model(copy.deepcopy(cfg))
    try:
        if is_switchable(model):
            raise CheckpointError('some convs have no config of their own')
        load_strictly(model, state_dict)
    except CheckpointError as error:
        raise ValueError(
            f'no config builds the deployed form: {error}; build the training form and '
            'call mmorepa.switch_to_deploy(model)'
        ) from error
    return cfg, model


def _deployed(node: Any) -> Any:
    if isinstance(node, (list, tuple)):
        return type(node)(_deployed(value) for value in node)
    if not isinstance(node, dict):
        return node
    kind = node.get('type')
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    if getattr(kind, '__name__', '') == 'build_with_branches':
        return _deployed(node['module'])
    for key, value in node.items():
        node[key] = _deployed(value)
    if isinstance(kind, type) and issubclass(kind, (StagedBackbone, ReparamConv2d)):
        node['deploy'] = True
    return node


def load_deployed(cfg: Config, checkpoint: dict) -> nn.Module:
    """The deployed model of a config with the weights of a checkpoint.

    Both may be of either form. The model is in eval mode on the CPU. Raises
    CheckpointError if the checkpoint does not fit.
    """
    state = checkpoint['state_dict']
    model = build_model(copy.deepcopy(cfg))
    if is_switchable(model):
        if any('branches' in key.split('.') for key in state):
            load_training_form(model, state)
            return switch_to_deploy(model)
        switch_to_deploy(model)
    load_strictly(model, state)
    return model
