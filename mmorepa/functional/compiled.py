"""The folds of :mod:`.closed_forms` compiled for the CPU that they run on.

On a CPU a fold waits for memory more than it computes. What PyTorch does operation by
operation, each a walk through memory, ``csrc/fold.cpp`` does in one walk. It is
compiled on request (:func:`build`, or ``python tools/build_fold.py``) and kept in a
cache folder; without it, the same is done in operations of PyTorch.
"""

import functools
import hashlib
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

_SOURCE = Path(__file__).with_name('csrc') / 'fold.cpp'
_NAME = 'mmorepa_fold'
_FLAGS = ['-O3', '-fopenmp', '-fno-math-errno']
# The flags of every set of instructions that PyTorch tells apart.
_INSTRUCTIONS = {
    'AVX2': ['-mavx2', '-mfma'],
    'AVX512': [
        *('-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma'),
        '-mprefer-vector-width=512',
    ],
}


class Parameters(NamedTuple):
    """The parameters of a kernel by the part that they play, or their gradients.

    None where there is no such branch. ``O`` and ``I`` are the output and input
    channels, ``T`` those between two composed convs, ``m`` the maps that the depthwise
    conv makes of each input.

    Args:
        scale (Tensor): Shape (branches, O).
        origin (Tensor, optional): Shape (O, I, k, k).
        first (Tensor, optional): Shape (T, I, 1, 1).
        second (Tensor, optional): Shape (O, k, k, T), or (O, T, 1, 1).
        separable (Tensor, optional): Shape (O, m·I, 1, 1).
        depthwise (Tensor, optional): Shape (m·I, 1, k, k).
        average (Tensor, optional): Shape (O, I, 1, 1).
        frequency (Tensor, optional): Shape (O, I, 1, 1).
        pointwise (Tensor, optional): Shape (O, I, 1, 1).
    """

    scale: Tensor
    origin: Optional[Tensor] = None
    first: Optional[Tensor] = None
    second: Optional[Tensor] = None
    separable: Optional[Tensor] = None
    depthwise: Optional[Tensor] = None
    average: Optional[Tensor] = None
    frequency: Optional[Tensor] = None
    pointwise: Optional[Tensor] = None


class Branches(NamedTuple):
    """All that a kernel is folded from.

    Args:
        parameters (Parameters): What is trained.
        rows (dict[str, int]): The row of ``scale`` by branch: ``'composed'``,
            ``'origin'``, ``'separable'``, ``'average'``, ``'frequency'`` and
            ``'pointwise'``, as far as they are there.
        identity (Tensor, optional): Added to ``first``.
        filters (Tensor, optional): Those of ``frequency``, shape (O, k, k).
    """

    parameters: Parameters
    rows: dict[str, int]
    identity: Optional[Tensor] = None
    filters: Optional[Tensor] = None


def library_path() -> Path:
    """Where the compiled folds are kept: in ``$MMOREPA_CACHE`` or ``~/.cache/mmorepa``.

    The name tells the source, the version of PyTorch and the instructions of the
    processor apart, so that machines may share a home directory.
    """
    folder = os.environ.get('MMOREPA_CACHE') or Path.home() / '.cache' / 'mmorepa'
    version = f'{torch.__version__} {" ".join(_flags())}'.encode()
    digest = hashlib.sha256(_SOURCE.read_bytes() + version).hexdigest()[:16]
    return Path(folder) / f'{_NAME}-{digest}.so'


def build() -> Path:
    """Compiles the folds, unless that is done; takes about 20 seconds.

    Returns:
        Path: The library.

    Raises:
        RuntimeError: If there is no compiler, or it fails.
    """
    path = library_path()
    if path.is_file():
        return path
    if hasattr(torch.ops.mmorepa, 'fold'):
        raise RuntimeError(
            'this process has loaded compiled folds of another version or place; '
            'compile these in another one: python tools/build_fold.py'
        )
    # Slow to import, and not needed anywhere else.
    from torch.utils import cpp_extension

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        try:
            cpp_extension.load(
                _NAME,
                [str(_SOURCE)],
                extra_cflags=_flags(),
                extra_ldflags=['-fopenmp'],
                build_directory=folder,
                is_python_module=False,
            )
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                'the folds could not be compiled, which takes GCC and the package '
                f'ninja; without that, training on a CPU is slower: {error}'
            ) from error
        (Path(folder) / f'{_NAME}.so').replace(path)
    _library.cache_clear()
    return path


def is_available() -> bool:
    """Whether the compiled folds are there."""
    return _library() is not None


@functools.cache
def _library() -> Optional[SimpleNamespace]:
    # There already in the process that compiled it.
    if not hasattr(torch.ops.mmorepa, 'fold'):
        try:
            path = library_path()
            if not path.is_file():
                return None
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            warnings.warn(
                'compiled folds cannot be loaded, and operations of PyTorch are used '
                f'instead; to compile them anew, delete what is there: {error}',
                stacklevel=2,
            )
            return None
    # Without the search for an overload, of which there is one.
    names = ('fold', 'fold_gradients')
    return SimpleNamespace(**{n: getattr(torch.ops.mmorepa, n).default for n in names})


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    return [*_FLAGS, *_INSTRUCTIONS.get(capability, [])]


def fold(t: Branches, kernel: Tensor) -> bool:
    """Writes the kernel, if there is compiled code for it.

    Args:
        t (Branches): Its branches.
        kernel (Tensor): Where to, shape (O, I, k, k).

    Returns:
        bool: Whether it is written. Not if the code is not compiled or the tensors are
        of another kind, device, layout or size than it takes.
    """
    return takes(t, kernel) and _library().fold(
        kernel, t.identity, t.filters, _rows(t), *t.parameters
    )


def fold_gradients(t: Branches, grad: Tensor, d: Parameters) -> bool:
    """Writes the gradients of the parameters, if there is compiled code for them.

    Args:
        t (Branches): The branches.
        grad (Tensor): That of the kernel, shape (O, I, k, k).
        d (Parameters): Where to, contiguous.

    Returns:
        bool: As for :func:`fold`.
    """
    return takes(t, grad) and _library().fold_gradients(
        grad, t.identity, t.filters, _rows(t), *t.parameters, *d
    )


def takes(t: Branches, kernel: Tensor) -> bool:
    """Whether there is compiled code for such a fold, layouts and sizes apart.

    Args:
        t (Branches): Its branches.
        kernel (Tensor): The kernel, or its gradient.
    """
    return (
        # A subclass might stand for something else than memory.
        type(kernel) in (Tensor, nn.Parameter)
        and kernel.device.type == 'cpu'
        and t.parameters.origin is not None
        and t.parameters.second is not None
        and _library() is not None
    )


def _rows(t: Branches) -> list[int]:
    # In the order of the C++ source, which does not look at those that are not there.
    order = ('composed', 'origin', 'separable', 'average', 'frequency', 'pointwise')
    return [t.rows.get(branch, 0) for branch in order]
