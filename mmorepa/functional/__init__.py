"""The algebra of re-parameterisation: pure functions on tensors."""

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
    'frequency_prior',
    'fuse_bn',
    'identity_1x1',
    'scaled_sum',
]
