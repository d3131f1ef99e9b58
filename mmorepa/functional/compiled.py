"""The folds of :mod:`.closed_forms`, compiled for the CPU of this machine.

On a CPU, a fold mostly waits for memory. Each operation of PyTorch reads and writes the
whole kernel, while ``csrc/fold.cpp`` reads and writes it once. Users compile that file
on request (:func:`build`, or ``python tools/build_fold.py``).
"""

import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from .branch_sum import BranchSum

_SOURCE = Path(__file__).with_name('csrc') / 'fold.cpp'
_NAME = 'mmorepa_fold'
# The compiled code expects the rows of these parts in this order.
_PARTS = ('origin', 'composed', 'average', 'frequency', 'pointwise', 'separable')
# These flags unroll the loops over taps and branches, so that registers hold values.
_FLAGS = (
    '-O3 -fopenmp -fno-math-errno '
    '--param=max-completely-peeled-insns=2000 --param=max-completely-peel-times=25'
)
# The flags for each instruction set that PyTorch distinguishes.
_INSTRUCTIONS = {
    'AVX2': '-mavx2 -mfma',
    'AVX512': '-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma '
    '-mprefer-vector-width=512',
}


def library_path() -> Path:
    """The path of the library in ``$MMOREPA_CACHE``, or else in ``~/.cache/mmorepa``.

    Machines may share the folder: the file name depends on source, version and CPU.
    """
    folder = os.environ.get('MMOREPA_CACHE') or Path.home() / '.cache' / 'mmorepa'
    version = f'{torch.__version__} {" ".join(_flags())}'.encode()
    digest = hashlib.sha256(_SOURCE.read_bytes() + version).hexdigest()[:16]
    return Path(folder) / f'{_NAME}-{digest}.so'


def build() -> Path:
    """Compiles the folds if they are not compiled yet, and returns the library's path.

    Compiling takes about 30 seconds.

    Raises:
        RuntimeError: If there is no compiler, or if the compiler fails.
    """
    path = library_path()
    if path.is_file():
        return path
    if hasattr(torch.ops.mmorepa, 'fold'):
        raise RuntimeError(
            'this process has loaded compiled folds of another version or place; '
            'compile these in another one: python tools/build_fold.py'
        )
    # This import is slow, and only this function needs it.
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
    is_available.cache_clear()
    return path


@functools.cache
def is_available() -> bool:
    """Whether the compiled folds exist and can be loaded."""
    if hasattr(torch.ops.mmorepa, 'fold'):  # This process has compiled them.
        return True
    try:
        path = library_path()
        if path.is_file():
            torch.ops.load_library(path)
        return path.is_file()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            'compiled folds cannot be loaded, and operations of PyTorch are used '
            f'instead; to compile them anew, delete what is there: {error}',
            stacklevel=2,
        )
        return False


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    return f'{_FLAGS} {_INSTRUCTIONS.get(capability, "")}'.split()


def supports(spec: BranchSum, tensors: Sequence[Tensor]) -> bool:
    """Whether there is compiled code for a fold of these parameters and gradients."""
    dtype = tensors[0].dtype
    return (
        spec.groups == 1
        and spec.shape[-1] in (1, 3, 5)
        and 0 not in spec.shape
        and dtype in (torch.float32, torch.float64)
        # A subclass of Tensor might not hold its values in memory.
        and all(
            type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype is dtype
            for t in tensors
        )
        and is_available()
    )


def fold(spec: BranchSum, tensors: Sequence[Tensor]) -> Tensor:
    """The kernel, (O, I, k, k) with channels last, if :func:`supports` returns True."""
    pieces = [t.contiguous() for t in tensors]
    # `default` saves PyTorch the search for an overload.
    return torch.ops.mmorepa.fold.default(pieces, *_options(spec, tensors))


def fold_gradients(
    spec: BranchSum, grad: Tensor, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of the parameters from the kernel's gradient, (O, I, k, k)."""
    pieces = [t.contiguous() for t in tensors]
    derivative = torch.ops.mmorepa.fold_gradients.default
    return derivative(grad, pieces, *_options(spec, tensors))


def _options(spec: BranchSum, tensors: Sequence[Tensor]) -> tuple:
    rows = [spec.rows.get(part, -1) for part in _PARTS]
    shape = *spec.shape, spec.expansion
    return shape, rows, spec.has_identity, spec.filters(like=tensors[0])
