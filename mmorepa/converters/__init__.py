"""Checkpoints of other projects, translated."""

from .architectures import ARCHITECTURES, backbone_of, identify
from .plain import classifier_entries, plain_twin, start_from_plain, twin_entries
from .published import from_published, to_published

__all__ = [
    'ARCHITECTURES',
    'backbone_of',
    'classifier_entries',
    'from_published',
    'identify',
    'plain_twin',
    'start_from_plain',
    'to_published',
    'twin_entries',
]
