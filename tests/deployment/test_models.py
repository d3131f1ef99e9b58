import copy

import pytest
import torch
from helpers import assert_near, classifier_cfg, import_models, trained_like
from mmengine.config import Config
from torch import nn

from mmorepa import is_switchable
from mmorepa.analysis import network_outputs
from mmorepa.deployment import load_deployed, loaded_by_config
from mmorepa.layers import switch_to_deploy
from mmorepa.runs import build_model
from mmorepa.utils.errors import CheckpointError

STOCK = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8)
BACKBONES = dict(
    ours=dict(type='OREPAResNet', depth=18, base_channels=8, out_indices=(3,)),
    dbb=dict(
        type='OREPAResNet', depth=18, base_channels=8, out_indices=(3,), block='dbb'
    ),
    conv_cfg=dict(STOCK, conv_cfg=dict(type='OREPAConv2d')),
    reparameterized=dict(type='Reparameterized', module=STOCK),
)


@pytest.fixture(autouse=True)
def mmpretrain():
    import_models('mmpretrain')


def classifier(backbone):
    model = classifier_cfg(backbone, 64, 3)
    return Config(dict(default_scope='mmpretrain', model=model))


def both_forms(cfg):
    """A model of the config, the state dicts of both forms, and what it computes."""
    model = trained_like(build_model(copy.deepcopy(cfg)))
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = network_outputs(model, image)
    training = copy.deepcopy(model.state_dict())
    return training, switch_to_deploy(model).state_dict(), image, expected


@pytest.mark.parametrize('name', BACKBONES)
def test_every_form_in_every_config(name):
    cfg = classifier(BACKBONES[name])
    before = copy.deepcopy(cfg)
    training, deployed, image, expected = both_forms(cfg)
    other, model = loaded_by_config(cfg, deployed)
    assert not is_switchable(model)
    assert_near(network_outputs(model, image), expected)
    assert cfg.to_dict() == before.to_dict()
    loads = [(cfg, training), (cfg, deployed), (other, deployed)]
    if name != 'reparameterized':  # Of the plain module, nothing is left to fold.
        loads.append((other, training))
    for config, state in loads:
        model = load_deployed(config, dict(state_dict=state))
        assert not is_switchable(model) and not model.training
        assert_near(network_outputs(model, image), expected)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 20


def test_plain_network():
    cfg = classifier(STOCK)
    state = build_model(copy.deepcopy(cfg)).state_dict()
    assert loaded_by_config(cfg, state)[0].model == cfg.model
    assert not is_switchable(load_deployed(cfg, dict(state_dict=state)))


def test_blocks_that_leave_a_bias_have_no_config():
    cfg = classifier(dict(BACKBONES['reparameterized'], block='dbb'))
    training, deployed, image, expected = both_forms(cfg)
    with pytest.raises(ValueError, match='no config builds the deployed form: .*bias'):
        loaded_by_config(cfg, deployed)
    for state in (training, deployed):
        model = load_deployed(cfg, dict(state_dict=state))
        assert_near(network_outputs(model, image), expected)


def test_misfit():
    cfg = classifier(BACKBONES['ours'])
    training, *_ = both_forms(cfg)
    cfg.model.backbone.depth = 34
    with pytest.raises(CheckpointError, match='does not fit'):
        load_deployed(cfg, dict(state_dict=training))
