"""Other things that people do to models with training forms."""

from functools import partial

import pytest
import torch
from helpers import assert_near, trained_like
from mmcv.cnn import ConvModule
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.ao import quantization

from mmorepa import add_branches, switch_to_deploy
from mmorepa.backbones import OREPAResNet
from mmorepa.converters import read_checkpoint
from mmorepa.layers import DBBConv2d, OREPAConv2d, RepVGGConv2d

BN = dict(type='BN')
KINDS = [OREPAConv2d, DBBConv2d, RepVGGConv2d]


def conv_and_norm(dtype):
    norm = trained_like(nn.BatchNorm2d(6))
    state = {'weight': torch.randn(6, 4, 3, 3)}
    state.update({f'norm.{k}': v for k, v in norm.state_dict().items()})
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('form', ['plain', 'branches'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_assigned_checkpoints_keep_their_dtype(kind, deploy, form, dtype):
    options = dict(padding=1, bias=False, norm_cfg=BN)
    conv = kind(4, 6, 3, deploy=deploy, **options)
    trained = trained_like(kind(4, 6, 3, **options)).to(dtype)
    state = conv_and_norm(dtype) if form == 'plain' else trained.state_dict()
    conv.load_state_dict(state, assign=True)
    assert {p.dtype for p in conv.parameters()} == {dtype}
    assert conv.eval()(torch.randn(1, 4, 5, 5, dtype=dtype)).dtype == dtype


def test_what_is_said_of_a_second_exchange():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    add_branches(model)
    for other in (model, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match='It has no plain conv'):
            add_branches(other)
    # One that was switched has plain convs again.
    assert isinstance(add_branches(switch_to_deploy(model))[0], OREPAConv2d)


def test_spectral_norm_of_a_module():
    cfg = dict(conv_cfg=dict(type='OREPAConv2d'), with_spectral_norm=True)
    with pytest.raises(KeyError, match=r'for spectral norm.*mmorepa\.switch_to_deploy'):
        ConvModule(3, 4, 3, **cfg)
    cfg['conv_cfg']['deploy'] = True
    ConvModule(3, 4, 3, **cfg)(torch.randn(1, 3, 5, 5))


def test_checkpoint_of_a_compiled_model(tmp_path):
    compiled = torch.compile(nn.Sequential(OREPAConv2d(3, 4, 3)))
    torch.save(compiled.state_dict(), tmp_path / 'compiled.pth')
    with pytest.raises(RuntimeError, match=r"'_orig_mod\.', .*replace"):
        read_checkpoint(str(tmp_path / 'compiled.pth'))
    backbone = OREPAResNet(18, base_channels=4)
    state = {f'_orig_mod.{k}': v for k, v in backbone.state_dict().items()}
    for load in (backbone.load_state_dict, partial(load_state_dict, backbone)):
        with pytest.raises(RuntimeError, match='torch.compile'):
            load(state)


@pytest.mark.parametrize('kind', KINDS)
def test_scripted(kind):
    model = trained_like(nn.Sequential(kind(3, 4, 3, padding=1))).eval()
    with pytest.raises((ValueError, RuntimeError)):
        torch.jit.script(model)
    switch_to_deploy(model)
    x = torch.randn(1, 3, 5, 5)
    assert_near(torch.jit.script(model)(x), model(x))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('kind', KINDS)
def test_quantization_aware_training(kind):
    """Of the deployed form alone."""
    model = nn.Sequential(kind(3, 4, 3, padding=1), nn.ReLU()).train()
    model.qconfig = quantization.get_default_qat_qconfig('fbgemm')
    with pytest.raises(TypeError, match='not quantized'):
        quantization.prepare_qat(model)
    prepared = quantization.prepare_qat(switch_to_deploy(model))
    assert isinstance(prepared[0], torch.ao.nn.qat.Conv2d)


def test_training_of_the_deployed_form(log):
    model = nn.Sequential(OREPAConv2d(3, 4, 3, deploy=True))
    cfg = dict(optimizer=dict(type='SGD', lr=0.1))
    build_optim_wrapper(model, dict(cfg, constructor='OREPAOptimWrapperConstructor'))
    assert any('in its deployed form, without branches: build it' in t for t in log)
