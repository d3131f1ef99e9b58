"""The benchmark of training costs: it runs, and what it counts is right."""

import json

import pytest
import torch
from helpers import assert_near, trained_like
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool_runs import command, run_apart, tool

from mmorepa.layers import OREPAKernel, OREPAPointwiseKernel

CONFIG = 'configs/digits/resnet18-slim-orepa_1xb64_digits.py'
NAME = 'benchmarks/train_cost.py'


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp('train_cost')
    options = ('--rounds', 2, '--batch-size', 2, '--size', 32, '--threads', 1)
    run = run_apart(*command(NAME, CONFIG, *options, '--out', out))
    assert run.returncode == 0, run.stderr
    document = json.loads((out / 'train_cost.json').read_text())
    assert 'PyTorch' in document['machine']
    return run.stdout, document['results'][0], out


@pytest.mark.slow
def test_bytes(result):
    _, figures, _ = result
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmpretrain')
    cfg.model.backbone.block = 'plain'
    plain = MODELS.build(cfg.model)
    own = sum(p.nbytes for p in plain.parameters())
    kernels = sum(p.nbytes for p in plain.parameters() if p.dim() == 4)
    steps = figures['steps']
    assert steps['plain']['parameter_bytes'] == own
    assert steps['plain']['gradient_bytes'] == own
    assert steps['plain']['optimizer_bytes'] == own  # momentum
    for name in ('stock', 'plain', 'OREPA, folded'):
        assert steps[name]['all_reduced_bytes'] == own
        assert steps[name]['saved_bytes'] == steps['plain']['saved_bytes']
    for name in ('OREPA, online', 'OREPA, naive'):
        assert steps[name]['all_reduced_bytes'] == steps[name]['parameter_bytes']
    # One copy of the folded kernels.
    online = steps['OREPA, online']['saved_bytes']
    assert 0 < online - steps['plain']['saved_bytes'] <= kernels * 1.02
    assert steps['OREPA, naive']['saved_bytes'] > online


@pytest.mark.parametrize(
    'kernel',
    [
        OREPAKernel(6, 4, 3, branches=['pointwise_kxk']),
        OREPAKernel(8, 4, 3, groups=2, branches=['pointwise_kxk']),
        OREPAPointwiseKernel(6, 4, branches=['pointwise_pointwise']),
        OREPAPointwiseKernel(4, 6, groups=2, branches=['pointwise_pointwise']),
    ],
)
def test_factors_of_the_floor(kernel):
    """Their product is the kernel of the composed branch."""
    trained_like(kernel)
    with torch.no_grad():
        kernel.scale.fill_(1)
        second, first = tool('benchmarks/step_costs.py').factors(kernel)
        if isinstance(kernel, OREPAKernel):
            # The floor is that of the weights alone, without the identity.
            first = first + torch.eye(first.shape[-1])
        product = (second @ first).reshape(kernel.scale.shape[1], -1, first.shape[-1])
        assert_near(product.transpose(1, 2).flatten(), kernel().flatten())
