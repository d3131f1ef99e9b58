"""Checkpoints: read without trust, fold, write without leaving halves behind."""

import copy
import os
import pickle
import tempfile
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from ..layers import ReparamConv2d, is_switchable, switch_to_deploy
from ..utils.errors import CheckpointError, name_keys
from ..version import __version__

_HISTORY_STATISTICS = ('mean', 'max', 'min', 'current')


def allow_mmengine_checkpoints() -> None:
    """Lets ``torch.load(weights_only=True)`` read what MMEngine's runner saves.

    A runner's checkpoint holds the history of the logged values: MMEngine's
    ``HistoryBuffer`` with numpy arrays, and four of its methods, which pickle
    writes as calls of ``getattr``. PyTorch refuses all of them since 2.6, and so
    MMEngine 0.10.7 can neither resume from nor test its own checkpoints. This
    allows these classes and, in the place of ``getattr``, a function that serves
    only the four methods; everything else stays refused.
    """
    scalar_types = [np.float64, np.float32, np.int64, np.int32, np.bool_]
    numpy_core = np._core if hasattr(np, '_core') else np.core
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_statistic, 'builtins.getattr'),
            # Both names: numpy 2 moved the module, and files name either.
            (numpy_core.multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
            (numpy_core.multiarray._reconstruct, 'numpy._core.multiarray._reconstruct'),
            (numpy_core.multiarray.scalar, 'numpy.core.multiarray.scalar'),
            (numpy_core.multiarray.scalar, 'numpy._core.multiarray.scalar'),
            np.ndarray,
            np.dtype,
            *{type(np.dtype(scalar)) for scalar in scalar_types},
        ]
    )


def _history_statistic(owner: Any, name: str) -> Any:
    """``getattr`` for the one use that MMEngine's checkpoints make of it."""
    if owner is HistoryBuffer and name in _HISTORY_STATISTICS:
        return getattr(owner, name)
    raise pickle.UnpicklingError(
        f'the checkpoint asks for attribute {name!r} of {owner!r}; only '
        f"{', '.join(_HISTORY_STATISTICS)} of MMEngine's HistoryBuffer are allowed"
    )


def read_checkpoint(path: str, keep_prefix: bool = False) -> dict:
    """Reads a checkpoint file without running code that it may hold.

    Args:
        path (str): A file of ``torch.save``: a dict with a ``state_dict``, or a
            bare state dict.
        keep_prefix (bool): Whether to keep the ``module.`` that model wrappers put
            before every key. Defaults to False.

    Returns:
        dict: With ``state_dict`` and, where the file has them, ``meta`` and whatever
        else it holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint, or holds more than tensors and
            plain containers.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path!r}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    # A damaged file can make the unpickler fail in any way, also without a message.
    except Exception as error:
        raise ValueError(
            f'{path!r} cannot be read as a checkpoint of tensors and plain '
            f'containers, and nothing else is loaded for safety: {_reason(error)}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{path!r} holds a {type(checkpoint).__name__}, not a checkpoint dict'
        )
    if 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': checkpoint}
    state = checkpoint['state_dict']
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f'{path!r} has no state dict of tensors: neither under '
            "'state_dict' nor as a whole"
        )
    if not keep_prefix:
        checkpoint['state_dict'] = {
            key.removeprefix('module.'): value for key, value in state.items()
        }
    return checkpoint


def _reason(error: Exception) -> str:
    """What was wrong with a file, without the advice to trust it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith('Check the documentation')]
    if not lines:
        return type(error).__name__
    if not lines[0].startswith('Weights only load failed'):
        return lines[0]
    return lines[-1].rpartition('WeightsUnpickler error: ')[-1].split(' Please use')[0]


def write_checkpoint(checkpoint: dict, path: str) -> None:
    """Writes a checkpoint under a temporary name, then renames it.

    Args:
        checkpoint (dict): What ``torch.save`` takes.
        path (str): The file. Its folder is made if need be.

    Raises:
        OSError: If the file cannot be written. What was there is left as it was.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f'{path!r} is a folder, not a file to write')
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=folder, prefix=f'.{os.path.basename(path)}.'
    )
    try:
        with os.fdopen(handle, 'wb') as file:
            torch.save(checkpoint, file)
        # mkstemp's file is private to its owner; a checkpoint is an ordinary file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_training_form(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads a training checkpoint, every key of it, into the training form.

    Args:
        model (nn.Module): In training form.
        state_dict (dict[str, Tensor]): Loaded strictly.

    Raises:
        CheckpointError: If the model has nothing to switch, the checkpoint is deployed
            already, or keys or shapes do not fit, which are named.
    """
    if not is_switchable(model):
        raise CheckpointError(
            'the model has no re-parameterised conv in training form: is deploy=True '
            'in its config, or does it use none of the types of mmorepa?'
        )
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        if (
            isinstance(module, ReparamConv2d)
            and f'{prefix}weight' in state_dict
            and not any(key.startswith(f'{prefix}branches.') for key in state_dict)
        ):
            raise CheckpointError(
                f"the checkpoint is deployed already: it holds '{prefix}weight', a "
                'plain kernel, where the training form has branches'
            )
    load_strictly(model, state_dict)


def load_strictly(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads a checkpoint that has to fit, in short words where it does not.

    A deployed model folds a training form, as whenever it is loaded.

    Args:
        model (nn.Module): Not wrapped.
        state_dict (dict[str, Tensor]): With every key of the model and no other.

    Raises:
        CheckpointError: If keys, which are named, are missing, not known or of
            another shape, or the checkpoint is a deployed form and the model is not.
    """
    own = model.state_dict()
    misshapen = {
        key: value.shape
        for key, value in state_dict.items()
        if key in own and own[key].shape != value.shape
    }
    # Left out, since PyTorch would stop at them, in words that name every one.
    rest = {k: value for k, value in state_dict.items() if k not in misshapen}
    loaded = model.load_state_dict(rest, strict=False)
    problems = [
        name_keys(
            'missing from the checkpoint', set(loaded.missing_keys) - misshapen.keys()
        ),
        name_keys('not known to the model', loaded.unexpected_keys),
        name_keys(
            'of another shape',
            [
                f'{key} ({tuple(shape)}, not {tuple(own[key].shape)})'
                for key, shape in misshapen.items()
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(
            'the checkpoint does not fit the config: '
            + '; '.join(filter(None, problems))
        )


def deploy_checkpoint(model: nn.Module, checkpoint: dict) -> dict:
    """The deployed checkpoint that belongs to a training checkpoint.

    Args:
        model (nn.Module): The training form; it is left as it is.
        checkpoint (dict): With ``state_dict`` and, optionally, ``meta``.

    Returns:
        dict: ``meta``, kept and marked as deployed, and ``state_dict``. The state
        of the optimizer, schedulers and logs is dropped.

    Raises:
        CheckpointError: As :func:`load_training_form`.
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
