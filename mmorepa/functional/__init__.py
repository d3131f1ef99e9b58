"""The algebra of re-parameterisation: pure functions on tensors."""

from .closed_forms import (
    fold_1x1,
    fold_1x1_gradients,
    fold_kxk,
    fold_kxk_gradients,
)
from .fusion import fuse_bn
from .kernels import (
    average_kernel,
    compose_1x1_kxk,
    compose_deep_linear,
    constant_response,
    depthwise_separable_kernel,
    embed_1x1,
    filtered_kernel,
    frequency_prior,
    identity_1x1,
    scaled_sum,
)

__all__ = [
    'average_kernel',
    'compose_1x1_kxk',
    'compose_deep_linear',
    'constant_response',
    'depthwise_separable_kernel',
    'embed_1x1',
    'filtered_kernel',
    'fold_1x1',
    'fold_1x1_gradients',
    'fold_kxk',
    'fold_kxk_gradients',
    'frequency_prior',
    'fuse_bn',
    'identity_1x1',
    'scaled_sum',
]
