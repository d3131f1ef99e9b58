"""Differences between outputs, what the branches give, and cost.

Parameters and FLOPs are counted in :mod:`.complexity`, time is taken in :mod:`.timing`.
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
