"""The floor of the benchmark of training costs."""

import pytest
import torch
from helpers import assert_near, trained_like
from tool_runs import tool

from mmorepa.layers import OREPAKernel, OREPAPointwiseKernel


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
