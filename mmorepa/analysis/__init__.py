"""Differences between outputs, branches, amplification of steps, and cost.

Parameters and FLOPs are counted in :mod:`.complexity`, time is taken in :mod:`.timing`.
"""

from .amplification import (
    LayerAmplification,
    amplification,
    backbone_amplifications,
    distribution,
    folded_convs,
    kernel_gradients,
    relative_amplifications,
)
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
    'LayerAmplification',
    'Share',
    'amplification',
    'backbone_amplifications',
    'branch_kernels',
    'cosine_similarities',
    'distribution',
    'folded_convs',
    'kernel_gradients',
    'largest_difference',
    'network_outputs',
    'raw_outputs',
    'relative_amplifications',
    'relative_step',
    'shares',
    'unwrapped',
    'watched_convs',
]
