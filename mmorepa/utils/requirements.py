"""The versions of the packages that mmorepa imports."""

from importlib import import_module
from types import ModuleType

_VERSIONS = {
    'mmengine': '>=0.10.0,<1.0.0',
    'mmcv': '>=2.0.0,<3.0.0',
    # The first that takes a name along with what a checkpoint may call by it.
    'torch': '>=2.6',
}
_ADVICE = (
    'pip install torch, and mmengine==0.10.7 with mmcv==2.1.0 (OpenMMLab) or '
    'onedl-mmengine==0.10.12 with onedl-mmcv==2.3.6 (OneDL), the same family as your '
    'other packages'
)


def check_requirements() -> None:
    """Checks the versions of MMEngine, MMCV and PyTorch.

    Raises:
        ImportError: If one is missing or does not fit, with what to install.
    """
    for name, versions in _VERSIONS.items():
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'mmorepa needs {name}, which is missing; {_ADVICE}'
            ) from error
        # Comes with MMEngine.
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(versions).contains(version, prereleases=True):
            raise ImportError(
                f'mmorepa needs {name}{versions}, found {version}; {_ADVICE}'
            )


def require(name: str) -> ModuleType:
    """Imports an optional module, such as ``'onnxruntime.quantization'``.

    Raises:
        ImportError: If it is missing; the message says how to install it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        package = missing.partition('.')[0]
        # A package that is there without it is too old.
        options = '' if missing == package else '--upgrade '
        raise ImportError(
            f'this needs {missing}, which is missing: pip install {options}{package}'
        ) from error
