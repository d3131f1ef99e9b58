"""The versions of Python and of the packages that mmorepa imports."""

import platform
import warnings
from importlib import import_module
from typing import NamedTuple


class _Requirement(NamedTuple):
    module: str
    versions: str
    tested: str
    advice: str


_EITHER = (
    'install it with `pip install {}` (OpenMMLab) or `pip install {}` (OneDL), the '
    'same family as your other packages'
)
_REQUIREMENTS = (
    _Requirement(
        'mmengine',
        '>=0.10.0,<1.0.0',
        '>=0.10.7,<=0.10.12',
        _EITHER.format('mmengine==0.10.7', 'onedl-mmengine==0.10.12'),
    ),
    _Requirement(
        'mmcv',
        '>=2.0.0,<3.0.0',
        '>=2.1.0,<=2.3.6',
        _EITHER.format('mmcv==2.1.0', 'onedl-mmcv==2.3.6'),
    ),
    # The first that takes a name along with what a checkpoint may call by it.
    _Requirement(
        'torch', '>=2.6', '>=2.6,<2.15', 'install it as https://pytorch.org says'
    ),
)
_TESTED_PYTHON = '>=3.10,<3.14'


def check_requirements() -> None:
    """Checks that MMEngine, MMCV and PyTorch are there, in versions that fit.

    Warns, once, of versions older or newer than all that were tested.

    Raises:
        ImportError: If one is missing or does not fit. The message names what to
            install.
    """
    untested = []
    for name, versions, tested, advice in _REQUIREMENTS:
        try:
            version = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'mmorepa needs {name}, which is missing; {advice}'
            ) from error
        if not _fits(version, versions):
            raise ImportError(
                f'mmorepa needs {name}{versions}, found {version}; {advice}'
            )
        if not _fits(version, tested):
            untested.append(f'{name} {version} (tested: {tested})')
    version = platform.python_version()
    if not _fits(version, _TESTED_PYTHON):
        untested.append(f'Python {version} (tested: {_TESTED_PYTHON})')
    if untested:
        warnings.warn(
            f'mmorepa has not been tested with {", ".join(untested)}', stacklevel=3
        )


def _fits(version: str, bounds: str) -> bool:
    # Comes with MMEngine.
    from packaging.specifiers import SpecifierSet

    # A local part, as in 2.14.1+cpu, would make it later than 2.14.1.
    return SpecifierSet(bounds).contains(version.split('+')[0], prereleases=True)
