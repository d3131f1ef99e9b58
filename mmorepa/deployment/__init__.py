"""Builds deployed models from a config and a checkpoint, and exports them.

:mod:`.onnx_files` and :mod:`.int8` need the packages ``onnx`` and ``onnxruntime``, and
:mod:`.pt2e` needs ``torchao``. Their functions import these packages when called.
"""

from .inference import build_inferencer, dataset_meta
from .models import load_deployed, loaded_by_config

__all__ = [
    'build_inferencer',
    'dataset_meta',
    'load_deployed',
    'loaded_by_config',
]
