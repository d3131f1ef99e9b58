"""The versions of the packages that mmorepa imports."""

from importlib import import_module
from types import ModuleType

_EITHER = (
    'install it with `pip install {}` (OpenMMLab) or `pip install {}` (OneDL), the '
    'same family as your other packages'
)
# By module: the versions that work, and how to install one.
_REQUIREMENTS = {
    'mmengine': (
        '>=0.10.0,<1.0.0',
        _EITHER.format('mmengine==0.10.7', 'onedl-mmengine==0.10.12'),
    ),
    'mmcv': ('>=2.0.0,<3.0.0', _EITHER.format('mmcv==2.1.0', 'onedl-mmcv==2.3.6')),
    # The first that takes a name along with what a checkpoint may call by it.
    'torch': ('>=2.6', 'install it as https://pytorch.org says'),
}


def check_requirements() -> None:
    """Checks the versions of MMEngine, MMCV and PyTorch.

    Raises:
        ImportError: If one is missing or does not fit, with what to install.
    """
    for name, (versions, advice) in _REQUIREMENTS.items():
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'mmorepa needs {name}, which is missing; {advice}'
            ) from error
        # Comes with MMEngine.
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(versions).contains(version, prereleases=True):
            raise ImportError(
                f'mmorepa needs {name}{versions}, found {version}; {advice}'
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
