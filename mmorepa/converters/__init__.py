"""Checkpoints of other projects, translated."""

from .architectures import ARCHITECTURES, backbone_of, identify
from .published import from_published, to_published

__all__ = [
    'ARCHITECTURES',
    'backbone_of',
    'from_published',
    'identify',
    'to_published',
]
