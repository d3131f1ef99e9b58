"""The deployed form of a config and a checkpoint, and its way out of PyTorch.

What needs the packages ``onnx`` and ``onnxruntime`` is in :mod:`.onnx_files` and
:mod:`.int8`, what needs ``torchao`` in :mod:`.pt2e`; they import them when called.
"""

from .inference import build_inferencer, dataset_meta
from .models import load_deployed, loaded_by_config

__all__ = [
    'build_inferencer',
    'dataset_meta',
    'load_deployed',
    'loaded_by_config',
]
