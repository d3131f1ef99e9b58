"""Compares the outputs of two forms of a model, and the branches of its layers.

:mod:`.complexity` counts parameters and FLOPs, and :mod:`.timing` measures time.
"""

from .branches import (
    BranchKernels,
    Share,
    branch_kernels,
    cosine_similarities,
    relative_step,
    shares,
)
from .comparison import (
    Difference,
    largest_difference,
    network_outputs,
    raw_outputs,
    unwrapped,
    watched_convs,
)

__all__ = [
    'BranchKernels',
    'Difference',
    'Share',
    'branch_kernels',
    'cosine_similarities',
    'largest_difference',
    'network_outputs',
    'raw_outputs',
    'relative_step',
    'shares',
    'unwrapped',
    'watched_convs',
]
