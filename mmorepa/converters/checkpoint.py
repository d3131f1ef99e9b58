"""Reads checkpoints without running their code, folds them, writes them atomically."""

import copy
import json
import os
import pickle
import zipfile
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..backbones.checks import describe_errors
from ..layers import is_switchable, outermost, switch_to_deploy
from ..utils.errors import COMPILED_KEYS, CheckpointError, describe_misfit
from ..utils.files import PathLike, atomic_write
from ..utils.requirements import require
from ..utils.weights import describe_damage
from ..version import __version__

_HISTORY_STATISTICS = ('mean', 'max', 'min', 'current')


def _history_statistic(owner: Any, name: str) -> Any:
    """A ``getattr`` that allows only what MMEngine's checkpoints need."""
    if owner is HistoryBuffer and name in _HISTORY_STATISTICS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'the checkpoint asks for attribute {name!r} of {owner!r}; only '
        f"{', '.join(_HISTORY_STATISTICS)} of MMEngine's HistoryBuffer are allowed"
    )


def allow_mmengine_checkpoints() -> None:
    """Lets ``torch.load(weights_only=True)`` read checkpoints of MMEngine's runner.

    They contain the history of the logged values: MMEngine's ``HistoryBuffer`` with
    numpy arrays, and four of its methods, which pickle writes as calls of ``getattr``.
    PyTorch refuses all of these since 2.6. This function allows these classes in the
    whole process, and replaces ``getattr`` by a function for only these four methods.
    """
    numpy_core = np._core if hasattr(np, '_core') else np.core
    functions = [
        (getattr(numpy_core.multiarray, name), f'numpy.{core}.multiarray.{name}')
        for name in ('_reconstruct', 'scalar')
        # numpy 2 moved the module, and files may contain either name.
        for core in ('core', '_core')
    ]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_statistic, 'builtins.getattr'),
            *functions,
            np.ndarray,
            np.dtype,
            *(type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', 'bool')),
        ]
    )


def read_checkpoint(path: str) -> dict:
    """Reads a checkpoint file without running any code in it.

    Args:
        path (str): A file of ``torch.save`` with a dict that has a ``state_dict``, or
            with a bare state dict. Or a ``.safetensors`` file.

    Returns:
        dict: The ``state_dict``, whose keys have no ``module.`` of model wrappers, and
        ``meta`` and other entries if the file has them.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, is not a checkpoint, has more than
            tensors and plain containers, or has NaN, Inf or a negative variance.
    """
    checkpoint = load_from_local(path)
    if 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': checkpoint}
    state = checkpoint['state_dict']
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f'{path!r}: {_NO_STATE}')
    checkpoint['state_dict'] = {
        key.removeprefix('module.'): value for key, value in state.items()
    }
    if any('_orig_mod.' in key for key in checkpoint['state_dict']):
        raise CheckpointError(f'{path!r}: {COMPILED_KEYS}')
    return checkpoint


# MMEngine also uses this for init_cfg, load_from and resume. Its own loader checks
# nothing, and OneDL's loader runs the code in files that PyTorch refuses.
@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: Any = 'cpu') -> dict:
    """Reads a file like :func:`read_checkpoint`, but returns its contents unchanged."""
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'no checkpoint at {filename!r}')
    try:
        if filename.endswith('.safetensors'):
            checkpoint = _read_safetensors(filename)
        else:
            if zipfile.is_zipfile(filename):
                _check_archive(filename)
            # Call this again, because OneDL's loader may have removed these classes.
            allow_mmengine_checkpoints()
            checkpoint = torch.load(filename, map_location, weights_only=True)
        problem = _problem(checkpoint, os.path.getsize(filename))
    # A damaged file can make the unpickler raise any exception, even without a message.
    except Exception as error:
        raise CheckpointError(
            f'{filename!r} cannot be read as a checkpoint of tensors and plain '
            f'containers, and nothing else is loaded for safety: {_reason(error)}'
        ) from error
    if problem:
        raise CheckpointError(f'{filename!r}: {problem}')
    return checkpoint


def _check_archive(path: str) -> None:
    """Verifies the checksums in a file of ``torch.save``."""
    with zipfile.ZipFile(path) as archive:
        # torch.save compresses nothing; files that are made to fill the memory do.
        if sum(i.file_size for i in archive.infolist()) > os.path.getsize(path):
            raise ValueError('it would be larger than its file')
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f'its part {damaged!r} does not have its checksum')


_NO_STATE = "no state dict of tensors, neither under 'state_dict' nor as a whole"


def _problem(checkpoint: Any, size: int) -> str:
    """Describes the first problem of the weights; empty if there is none."""
    if not isinstance(checkpoint, dict):
        return f'holds a {type(checkpoint).__name__}, not a checkpoint dict'
    if not isinstance(checkpoint.get('meta') or {}, dict):
        return "its 'meta' is no dict"
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict):
        return _NO_STATE
    # Some toolboxes store the weights under another name.
    if state is checkpoint and not any(isinstance(v, Tensor) for v in state.values()):
        return ''
    for key, value in state.items():
        if not isinstance(key, str):
            return f'the key {key!r:.80} is no string'
        if not isinstance(value, Tensor):
            return _NO_STATE
        if value.numel() * value.element_size() > size:
            return f'{key!r}, of shape {tuple(value.shape)}, is larger than the file'
        words = describe_damage(key, value)
        if words:
            return f'{key!r} {words}'
    return ''


def _reason(error: Exception) -> str:
    """The cause of an error, without PyTorch's advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith('Check the documentation')]
    if not lines:
        return type(error).__name__
    if not lines[0].startswith('Weights only load failed'):
        # For a file of another kind, the message is only a number or a letter.
        return lines[0] if ' ' in lines[0] else 'it is no file of torch.save'
    return lines[-1].rpartition('WeightsUnpickler error: ')[-1].split(' Please use')[0]


def write_checkpoint(checkpoint: dict, path: PathLike) -> None:
    """Writes a checkpoint under a temporary name, then renames it.

    Args:
        checkpoint (dict): Any dict for ``torch.save``. In a ``.safetensors`` file, only
            ``state_dict`` (or a bare state dict) and ``meta``, as text, are written.
        path (str | Path): The file. Its folder is made if it does not exist.

    Raises:
        OutputError: If the file cannot be written. An older file is then unchanged.
        ImportError: If ``safetensors`` is needed and not installed.
    """
    with atomic_write(path) as file:
        if file.suffix == '.safetensors':
            file.write_bytes(_to_safetensors(checkpoint))
            return
        try:
            with file.open('wb') as stream:
                torch.save(checkpoint, stream)
        except RuntimeError as error:
            # PyTorch hides the error of the operating system.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _read_safetensors(path: str) -> dict:
    with require('safetensors.torch').safe_open(path, 'pt') as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = (file.metadata() or {}).get('meta')
    return {'state_dict': state} | ({} if meta is None else {'meta': json.loads(meta)})


def _to_safetensors(checkpoint: dict) -> bytes:
    state = checkpoint.get('state_dict', checkpoint)
    # The format needs tensors that do not share memory.
    state = {key: value.contiguous().clone() for key, value in state.items()}
    meta = json.dumps(checkpoint.get('meta') or {}, default=_to_json)
    return require('safetensors.torch').save(state, {'format': 'pt', 'meta': meta})


def _to_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, 'tolist') else str(value)


def load_training_form(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads a training checkpoint strictly into the training form.

    Raises CheckpointError if the model has no training form, if the checkpoint is
    deployed already, or if keys or shapes do not fit. The error names them.
    """
    if not is_switchable(model):
        raise CheckpointError(
            'the model has no re-parameterised conv in training form: does its config '
            'have deploy=True, or no type of mmorepa?'
        )
    for name, _ in outermost(model):
        kernel = f'{name}.weight'.lstrip('.')
        branches = kernel.removesuffix('weight') + 'branches.'
        if kernel in state_dict and not any(k.startswith(branches) for k in state_dict):
            raise CheckpointError(
                f'the checkpoint is deployed already: it holds {kernel!r}, a plain '
                'kernel, where the training form has branches'
            )
    load_strictly(model, state_dict)


def load_strictly(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads a checkpoint strictly. A deployed model folds a training checkpoint.

    Raises CheckpointError if keys are missing, unknown or of another shape, and names
    them. Also raises it if the checkpoint is deployed and the model is not.
    """
    try:
        loaded = model.load_state_dict(state_dict, strict=False)
    except CheckpointError:
        raise
    except RuntimeError as error:
        errors = describe_errors(str(error).splitlines()[1:] or [str(error)])
        raise CheckpointError(
            f'the checkpoint does not fit the config: {errors}'
        ) from error
    problems = describe_misfit(
        dict.fromkeys(loaded.missing_keys, ()),
        dict.fromkeys(loaded.unexpected_keys, ()),
    )
    if problems:
        raise CheckpointError(
            f'the checkpoint does not fit the config: {problems}{_origin(state_dict)}'
        )


def _origin(state_dict: dict[str, Tensor]) -> str:
    """Advice for a checkpoint that a converter can translate; empty for others."""
    if any('.rbr_' in key or '.weight_orepa' in key for key in state_dict):
        return (
            '; it is one of the published OREPA code by its keys: convert it by '
            '`python -m mmorepa convert`'
        )
    if 'bn1.weight' in state_dict:
        return (
            '; it is one of a plain ResNet by its keys: start from it by init_cfg, or '
            'convert it by `python -m mmorepa convert_plain`'
        )
    return ''


def deploy_checkpoint(model: nn.Module, checkpoint: dict) -> dict:
    """Folds a training checkpoint to a deployed checkpoint.

    Args:
        model (nn.Module): The training form; it is not changed.
        checkpoint (dict): Has ``state_dict`` and, optionally, ``meta``.

    Returns:
        dict: ``state_dict`` and ``meta``, which is marked as deployed. The states of
        the optimizer, schedulers and logs are dropped.

    Raises:
        CheckpointError: See :func:`load_training_form`.
    """
    if is_model_wrapper(model):
        model = model.module
    model = copy.deepcopy(model).cpu().eval()
    load_training_form(model, checkpoint['state_dict'])
    switch_to_deploy(model)
    meta = dict(
        checkpoint.get('meta') or {}, mmorepa_version=__version__, deployed=True
    )
    return {'meta': meta, 'state_dict': model.state_dict()}
