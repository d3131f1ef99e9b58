"""The passes of :mod:`.passes`, compiled for the CPU that they run on.

On a CPU a fold waits for memory more than it computes. What PyTorch does operation by
operation, each a walk through memory, ``csrc/passes.cpp`` does in one walk. It is
compiled on request (:func:`build`, or ``python tools/build_passes.py``) and kept in a
cache folder; without it, the folds use :mod:`.passes`.
"""

import functools
import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Optional

import torch
from torch import Tensor, nn

from .passes import Roles

_SOURCE = Path(__file__).with_name('csrc') / 'passes.cpp'
_NAME = 'mmorepa_passes'
# Without errno the compiler may use the instructions of the processor for everything.
_FLAGS = ['-O3', '-fopenmp', '-fno-math-errno']
# Flags for every set of instructions that PyTorch distinguishes.
_INSTRUCTIONS = {
    'AVX2': ['-mavx2', '-mfma'],
    'AVX512': [
        *('-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma'),
        '-mprefer-vector-width=512',
    ],
}


def library_path() -> Path:
    """Where the compiled passes are: in ``$MMOREPA_CACHE`` or ``~/.cache/mmorepa``.

    The name tells the source, the version of PyTorch and the instructions of the
    processor apart, so that machines may share a home directory.
    """
    folder = os.environ.get('MMOREPA_CACHE') or Path.home() / '.cache' / 'mmorepa'
    depends_on = [
        _SOURCE.read_bytes(),
        torch.__version__.encode(),
        repr(_flags()).encode(),
    ]
    digest = hashlib.sha256(b'\0'.join(depends_on)).hexdigest()[:16]
    return Path(folder) / f'{_NAME}-{digest}.so'


def build() -> Path:
    """Compiles the passes, unless that is done; takes about 20 seconds.

    Returns:
        Path: The library.

    Raises:
        RuntimeError: If there is no compiler, or it fails. GCC is needed.
    """
    path = library_path()
    if path.is_file():
        return path
    # Not needed anywhere else, and slow to import.
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
                'the passes of the fold could not be compiled, which takes GCC and '
                f'ninja; without them, training on a CPU is slower: {error}'
            ) from error
        (Path(folder) / f'{_NAME}.so').replace(path)
    _library.cache_clear()
    return path


def is_available() -> bool:
    """Whether the compiled passes are there to be used."""
    return _library() is not None


@functools.cache
def _library() -> Optional[Path]:
    if not hasattr(torch.ops.mmorepa, 'combine'):
        path = library_path()
        if not path.is_file():
            return None
        torch.ops.load_library(path)
    return torch.ops.mmorepa


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    return [*_FLAGS, *_INSTRUCTIONS.get(capability, [])]


def can_take(t: Roles) -> bool:
    """Whether there are compiled passes for these branches.

    Args:
        t (Roles): The branches.
    """
    return (
        # Not a subclass, which might stand for something else than memory.
        type(t.scale) in (Tensor, nn.Parameter)
        and t.scale.device.type == 'cpu'
        and t.scale.dtype in (torch.float32, torch.float64)
        and t.origin is not None
        and t.origin.shape[2] in (1, 9)
        and t.second is not None
        and (t.separable is None or t.separable.shape[2] == 8)
        and is_available()
    )


def combine(kernel: Tensor, rows: slice, composed: Tensor, t: Roles) -> None:
    """See :func:`.passes.combine`."""
    _library().combine(
        *(kernel, rows.start, rows.stop, composed, t.scale, _row_of(t), t.origin),
        *(t.separable, t.depthwise, list(t.filtered.values()), t.filters),
    )


def split(grad: Tensor, rows: slice, t: Roles, d: Roles) -> Tensor:
    """See :func:`.passes.split`."""
    _, inputs, taps = grad.shape
    by_tap = grad.new_empty(rows.stop - rows.start, taps, inputs)
    _library().split(
        *(grad, rows.start, rows.stop, by_tap, t.scale, d.scale, _row_of(t)),
        *(t.origin, d.origin, t.separable, d.separable, t.depthwise, d.depthwise),
        *(list(t.filtered.values()), list(d.filtered.values()), t.filters),
    )
    return by_tap


def rescale(rows: slice, by_tap: Tensor, product: Tensor, t: Roles, d: Roles) -> None:
    """See :func:`.passes.rescale`."""
    row = t.row_of['composed']
    _library().rescale(
        *(rows.start, rows.stop, by_tap, product, t.second, d.second),
        *(t.scale[row], d.scale[row]),
    )


def _row_of(t: Roles) -> list[int]:
    # In the order that the C++ source names; unused where there is no such branch.
    roles = ('composed', 'origin', 'separable', *t.filtered)
    return [t.row_of.get(role, 0) for role in roles]
