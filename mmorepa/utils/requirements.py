"""The versions of Python and of the packages that mmorepa imports."""

import platform
import warnings
from importlib import import_module
from types import ModuleType

# By module: the versions that work, and those that were tested.
_VERSIONS = {
    'mmengine': ('>=0.10.0,<1.0.0', '>=0.10.7,<=0.10.12'),
    'mmcv': ('>=2.0.0,<3.0.0', '>=2.1.0,<=2.3.6'),
    # The first whose add_safe_globals() takes pairs of a class and a name.
    'torch': ('>=2.6', '>=2.6,<2.15'),
}
_TESTED_PYTHON = '>=3.10,<3.14'
_ADVICE = (
    'pip install torch, and mmengine==0.10.7 with mmcv==2.1.0 (OpenMMLab) or '
    'onedl-mmengine==0.10.12 with onedl-mmcv==2.3.6 (OneDL), the same family as your '
    'other packages'
)


def check_requirements() -> None:
    """Checks the versions of MMEngine, MMCV and PyTorch; warns of untested ones.

    Raises:
        ImportError: If one is missing or does not fit, with what to install.
    """
    installed = {'Python': (platform.python_version(), _TESTED_PYTHON)}
    for name, (versions, tested) in _VERSIONS.items():
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'mmorepa needs {name}, which is missing; {_ADVICE}'
            ) from error
        if not _fits(version, versions):
            raise ImportError(
                f'mmorepa needs {name}{versions}, found {version}; {_ADVICE}'
            )
        installed[name] = version, tested
    untested = [
        f'{name} {version} (tested: {tested})'
        for name, (version, tested) in installed.items()
        if not _fits(version, tested)
    ]
    if untested:
        warnings.warn(
            f'mmorepa has not been tested with {", ".join(untested)}', stacklevel=3
        )


def _fits(version: str, bounds: str) -> bool:
    # Comes with MMEngine.
    from packaging.specifiers import SpecifierSet

    # A local part, as in 2.14.1+cpu, would make it later than 2.14.1.
    return SpecifierSet(bounds).contains(version.split('+')[0], prereleases=True)


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
