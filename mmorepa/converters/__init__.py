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
from .plain_classifiers import (
    classifier_entries,
    entries_of_twin,
    plain_twin,
    start_from_plain,
)
from .published import from_published

__all__ = [
    'ARCHITECTURES',
    'allow_mmengine_checkpoints',
    'backbone_of',
    'classifier_entries',
    'deploy_checkpoint',
    'entries_of_twin',
    'from_published',
    'identify',
    'load_strictly',
    'load_training_form',
    'plain_twin',
    'read_checkpoint',
    'start_from_plain',
    'write_checkpoint',
]
