"""Reads and writes checkpoints, and translates checkpoints of other projects."""

from .architectures import identify
from .checkpoint import (
    allow_mmengine_checkpoints,
    deploy_checkpoint,
    load_strictly,
    load_training_form,
    read_checkpoint,
    write_checkpoint,
)
from .plain_classifiers import start_from_plain
from .published import from_published

__all__ = [
    'allow_mmengine_checkpoints',
    'deploy_checkpoint',
    'from_published',
    'identify',
    'load_strictly',
    'load_training_form',
    'read_checkpoint',
    'start_from_plain',
    'write_checkpoint',
]
