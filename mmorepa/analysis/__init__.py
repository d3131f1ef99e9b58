"""Differences between outputs, amplification of steps, and cost.

The cost is in :mod:`.complexity`, which is slow to import.
"""

from .amplification import (
    LayerAmplification,
    amplification,
    backbone_amplifications,
    distribution,
    folded_convs,
    kernel_gradients,
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
    'Difference',
    'LayerAmplification',
    'amplification',
    'backbone_amplifications',
    'distribution',
    'folded_convs',
    'kernel_gradients',
    'largest_difference',
    'network_outputs',
    'raw_outputs',
    'unwrapped',
    'watched_convs',
]
