"""Reads and writes checkpoints, and translates those of other projects."""

from .architectures import ARCHITECTURES, backbone_of, identify
from .checkpoint import (
    allow_mmengine_checkpoints,
    deploy_checkpoint,
    load_strictly,
    load_training_form,
    read_checkpoint,
    write_checkpoint,
)
from .plain import classifier_entries, plain_twin, start_from_plain, twin_entries
from .published import from_published

__all__ = [
    'ARCHITECTURES',
    'allow_mmengine_checkpoints',
    'backbone_of',
    'classifier_entries',
    'deploy_checkpoint',
    'from_published',
    'identify',
    'load_strictly',
    'load_training_form',
    'plain_twin',
    'read_checkpoint',
    'start_from_plain',
    'twin_entries',
    'write_checkpoint',
]
