"""Training forms that tracers, compilers and exporters see."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from helpers import assert_near, trained_like
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from mmorepa import add_branches, switch_to_deploy
from mmorepa.layers import DBBConv2d, OREPAConv2d, RepVGGConv2d

KINDS = [OREPAConv2d, DBBConv2d, RepVGGConv2d]


class Doubled(OREPAConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def parameters_of(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('block', ['orepa', 'dbb', 'repvgg'])
def test_feature_extractor(block):
    net = add_branches(resnet18(num_classes=10), block).eval()
    x = torch.randn(1, 3, 32, 32)
    nodes = dict.fromkeys(['layer1.0.conv1', 'layer4'])
    extractor = create_feature_extractor(net, list(nodes))
    with torch.no_grad():
        expected = extractor(x)
        switch_to_deploy(extractor)
        for name, out in extractor(x).items():
            assert_near(out, expected[name], 1e-4)
    # The classifier is left out.
    biases = 4800 if block == 'orepa' else 0
    assert parameters_of(extractor) - parameters_of(resnet18()) <= biases
    assert not any('branches' in name for name in extractor.state_dict())


@pytest.mark.parametrize('kind', [*KINDS, Doubled])
def test_symbolic_trace(kind):
    model = trained_like(nn.Sequential(kind(4, 4, 3, padding=1), nn.ReLU())).eval()
    x = torch.randn(1, 4, 6, 6)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert_near(traced(x), expected)
    if kind is Doubled:  # Its operations are traced.
        with pytest.raises(RuntimeError, match='before it is traced'):
            switch_to_deploy(traced)
    else:
        assert_near(switch_to_deploy(traced)(x), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_programs_are_refused(kind):
    model = nn.Sequential(kind(4, 4, 3, padding=1)).eval()
    x = torch.randn(2, 4, 6, 6)
    for program in (
        torch.fx.symbolic_trace(model[0]),
        torch.export.export(model, (x,)).module(),
    ):
        assert_near(program(x), model(x))
        with pytest.raises(RuntimeError, match='before it is traced or exported'):
            switch_to_deploy(program)


JIT = """
import torch
from torch import nn
from mmorepa.layers import DBBConv2d, OREPAConv2d
model = nn.Sequential(OREPAConv2d(3, 8, 3), OREPAConv2d(8, 8, 7), OREPAConv2d(8, 8, 1))
model.append(DBBConv2d(8, 8, 3, padding=1)).eval()
torch.jit.trace(model, torch.randn(1, 3, 16, 16))
"""


def test_jit_trace_of_a_new_process():
    """Its check runs the model twice, and takes constants that were made inside."""
    command = [sys.executable, '-W', 'error::torch.jit.TracerWarning', '-c', JIT]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize('kind', KINDS)
def test_onnx(kind):
    pytest.importorskip('onnxscript')
    model = nn.Sequential(kind(4, 4, 3, padding=1)).eval()
    images = (torch.randn(2, 4, 6, 6),)
    for dynamo in (False, True):
        with pytest.raises(RuntimeError) as error:
            torch.onnx.export(model, images, io.BytesIO(), dynamo=dynamo)
        reasons = f'{error.value} {error.value.__cause__}'
        assert 'is not exported to ONNX: call mmorepa.switch_to_deploy' in reasons
    deployed = switch_to_deploy(copy.deepcopy(model))
    torch.onnx.export(deployed, images, dynamo=True, verbose=False)
