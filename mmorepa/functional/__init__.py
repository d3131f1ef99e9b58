"""The algebra of re-parameterisation: pure functions on tensors."""

from .branch_sum import BranchSum
from .closed_forms import fold_kernel, is_being_traced
from .kernels import (
    average_kernel,
    cached_constant,
    compose_1x1_kxk,
    compose_deep_linear,
    constant_response,
    depthwise_separable_kernel,
    embed_1x1,
    filtered_kernel,
    frequency_prior,
    identity_1x1,
    scaled_sum,
    solve_deep_linear,
)

__all__ = [
    'BranchSum',
    'average_kernel',
    'compose_1x1_kxk',
    'compose_deep_linear',
    'cached_constant',
    'constant_response',
    'depthwise_separable_kernel',
    'embed_1x1',
    'filtered_kernel',
    'fold_kernel',
    'frequency_prior',
    'identity_1x1',
    'is_being_traced',
    'scaled_sum',
    'solve_deep_linear',
]
