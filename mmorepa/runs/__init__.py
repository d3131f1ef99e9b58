"""The steps of the command lines: from a config to a model, its data and a runner."""

from .config import (
    add_hook,
    build_model,
    keep_few_checkpoints,
    use_amp,
    use_tta,
    use_visualization,
)
from .data import build_loader, check_data_folders, innermost, name_broken_images
from .runner import check_start, find_start, make_runner, set_up_distributed_cpu

__all__ = [
    'add_hook',
    'build_loader',
    'build_model',
    'check_data_folders',
    'check_start',
    'find_start',
    'innermost',
    'keep_few_checkpoints',
    'make_runner',
    'name_broken_images',
    'set_up_distributed_cpu',
    'use_amp',
    'use_tta',
    'use_visualization',
]
