"""Training forms that tracers, compilers and exporters see."""

import copy
import io

import pytest
import torch
from helpers import assert_near, trained_like
from torch import nn

from mmorepa import switch_to_deploy
from mmorepa.layers import DBBConv2d, OREPAConv2d, RepVGGConv2d

KINDS = [OREPAConv2d, DBBConv2d, RepVGGConv2d]


class Doubled(OREPAConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('kind', [*KINDS, Doubled])
def test_symbolic_trace(kind):
    model = trained_like(nn.Sequential(kind(4, 4, 3, padding=1), nn.ReLU())).eval()
    x = torch.randn(1, 4, 6, 6)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    assert_near(traced(x), expected)
    assert_near(switch_to_deploy(traced)(x), expected)


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
