import json
import subprocess
import sys

import pytest
import torch
from scenes import ROOT

from mmorepa import switch_to_deploy
from mmorepa.analysis import (
    amplification,
    backbone_amplifications,
    distribution,
    folded_convs,
    relative_amplifications,
)
from mmorepa.analysis.amplification import is_plain
from mmorepa.backbones import OREPARepVGG, OREPAResNet
from mmorepa.layers import DeepLinearConv2d, OREPAConv2d, PlainConv2d


def jacobian(conv):
    """All of J, row by row of W."""
    params = [p for p in conv.branches.parameters() if p.requires_grad]
    kernel = conv.branches()
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(entry, params, retain_graph=True)]
        )
        for entry in kernel.flatten()
    ]
    return torch.stack(rows)


CONVS = [(OREPAConv2d, 1), (OREPAConv2d, 3), (OREPAConv2d, 7), (DeepLinearConv2d, 5)]


@pytest.mark.parametrize(('kind', 'size'), CONVS)
def test_against_the_whole_jacobian(float64, kind, size):
    conv = kind(2, 3, size, bias=False)
    matrix = jacobian(conv)
    gradient = torch.randn(3, 2, size, size)
    vector = gradient.flatten()
    expected = vector @ matrix @ matrix.T @ vector / (vector @ vector)
    assert amplification(conv, [gradient]) == pytest.approx(expected.item())
    mean = (matrix @ matrix.T).trace().item() / len(vector)
    assert amplification(conv, 400) == pytest.approx(mean, rel=0.1)


def test_is_what_a_step_does(float64):
    """An SGD step on the branches, for a loss that is linear in the kernel."""
    conv = OREPAConv2d(4, 6, 7, bias=False)
    gradient = torch.randn(6, 4, 7, 7)
    before = conv.kernel().detach().clone()
    (conv.kernel() * gradient).sum().backward()
    lr = 1e-7
    torch.optim.SGD(conv.parameters(), lr=lr).step()
    moved = ((before - conv.kernel().detach()) * gradient).sum() / lr
    expected = moved / gradient.square().sum()
    assert amplification(conv, [gradient]) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(('kind', 'size'), CONVS)
def test_relative_amplification_is_that_of_the_normalised_kernel(float64, kind, size):
    """The first step's gain for a loss of W_o / |W_o|, over that of a step on it."""
    conv = kind(2, 3, size, bias=False)
    rows = conv.kernel().detach().flatten(1)
    weights = (rows / rows.norm(dim=1, keepdim=True)).requires_grad_()
    target = torch.randn(3, rows.shape[1])
    # Any function that does not know the scale.
    (weights / weights.norm(dim=1, keepdim=True) * target).sum().backward()
    kernel = conv.branches().flatten(1)
    loss = (kernel / kernel.norm(dim=1, keepdim=True) * target).sum()
    (gradient,) = torch.autograd.grad(loss, kernel, retain_graph=True)
    loss.backward()
    gain = sum(p.grad.square().sum() for p in conv.branches.parameters())
    expected = (gain / weights.grad.square().sum()).item()
    gradient = gradient.reshape(3, 2, size, size)
    assert relative_amplifications(conv, [gradient, 3 * gradient]) == pytest.approx(
        [expected, expected]
    )


def test_relative_amplification_of_a_plain_conv(float64):
    conv = PlainConv2d(3, 1, 7, bias=False)
    expected = 1 / conv.weight.detach().square().sum().item()
    assert relative_amplifications(conv, 3) == pytest.approx([expected] * 3)
    with torch.no_grad():
        conv.branches.weight.mul_(10)
    assert relative_amplifications(conv, 1) == pytest.approx([expected / 100])


def test_plain_conv():
    conv = PlainConv2d(3, 8, 7, bias=False)
    assert is_plain(conv) and amplification(conv, 2) == pytest.approx(1)
    assert not is_plain(OREPAConv2d(3, 8, 3))


def test_errors():
    conv = OREPAConv2d(3, 4, 3)
    with pytest.raises(ValueError, match='not zero'):
        amplification(conv, [torch.zeros(4, 3, 3, 3)])
    with pytest.raises(ValueError, match='not zero'):
        relative_amplifications(conv, [torch.ones(4, 3, 3, 3), torch.zeros(4, 3, 3, 3)])
    switch_to_deploy(conv)
    for measure in (amplification, relative_amplifications):
        with pytest.raises(ValueError, match='training form'):
            measure(conv, 1)


def test_stem_of_the_papers_network():
    """The deep linear stem moves two orders further; relative to its size, twice."""
    layers = backbone_amplifications(OREPAResNet(18), 1)
    stem = [layer for layer in layers if layer.is_stem]
    others = [layer for layer in layers if not layer.is_stem]
    assert [layer.name for layer in stem] == ['stem'] and len(others) == 19
    assert 50 < stem[0].amplification < 200
    assert all(0.8 < layer.amplification < 1.2 for layer in others)
    assert [layer.kernel_size for layer in others if layer.is_plain] == [1, 1, 1]


def test_repvgg():
    """Its blocks have branches with a norm each; the folded ones are measured."""
    net = OREPARepVGG('A0', base_channels=8)
    names = [name for name, _ in folded_convs(net)]
    layers = backbone_amplifications(net, 1)
    assert [layer.name for layer in layers] == names
    assert any(layer.is_stem for layer in layers)


def test_distribution():
    torch.manual_seed(0)
    normal = distribution(3 * torch.randn(200, 500))
    assert normal.std == pytest.approx(3, rel=0.01)
    assert normal.kurtosis == pytest.approx(0, abs=0.1)
    heavy = distribution(torch.distributions.Laplace(0, 1).sample((100000,)))
    assert heavy.kurtosis == pytest.approx(3, abs=0.6)
    assert distribution(torch.tensor([1.0, -5.0])).largest == 5


@pytest.mark.slow
def test_tool(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            'tools/analysis_tools/stem_lr.py',
            'configs/coco/faster-rcnn_r50-orepa_fpn_1x_coco.py',
            'none',
            '--draws=1',
            f'--out={tmp_path / "stem.png"}',
            f'--json={tmp_path / "stem.json"}',
            '--cfg-options',
            'model.backbone.base_channels=16',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / 'stem.json').read_text())
    assert figures['groups'].keys() == {'stem', 'folded 1x1', 'folded 3x3'}
    stem, other = (figures['groups'][k] for k in ('stem', 'folded 3x3'))
    assert stem['amplification']['median'] > 10 * other['amplification']['median']
    assert set(figures['weights']) == {
        'factor 1', 'factor 2', 'factor 3', 'folded stem', 'plain stem'
    }  # fmt: skip
    assert figures['weights']['folded stem']['kurtosis'] > 3
    assert (tmp_path / 'stem.png').read_bytes().startswith(b'\x89PNG')
    assert figures['advice'] is None and 'cannot say' in done.stdout
    assert 'stem_lr_mult=' not in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ['stem.json', 'stem.png']
