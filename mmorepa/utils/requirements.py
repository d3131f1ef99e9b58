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
        *('mmengine', '>=0.10.0,<1.0.0', '>=0.10.7,<=0.10.12'),
        _EITHER.format('mmengine==0.10.7', 'onedl-mmengine==0.10.12'),
    ),
    _Requirement(
        *('mmcv', '>=2.0.0,<3.0.0', '>=2.1.0,<=2.3.6'),
        _EITHER.format('mmcv==2.1.0', 'onedl-mmcv==2.3.6'),
    ),
    # The first that takes a name along with what a checkpoint may call by it.
    _Requirement(
        'torch', '>=2.6', '>=2.6,<2.15', 'install it as https://pytorch.org says'
    ),
)
_TESTED_PYTHON = '>=3.10,<3.14'


def check_requirements() -> None:
    """Checks the versions of MMEngine, MMCV and PyTorch; warns of untested ones.

    Raises:
        ImportError: If one is missing or does not fit, with what to install.
    """
    installed = {'Python': platform.python_version()}
    for name, versions, _, advice in _REQUIREMENTS:
        try:
            installed[name] = import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'mmorepa needs {name}, which is missing; {advice}'
            ) from error
        if not _fits(installed[name], versions):
            raise ImportError(
                f'mmorepa needs {name}{versions}, found {installed[name]}; {advice}'
            )
    tested = {'Python': _TESTED_PYTHON, **{r.module: r.tested for r in _REQUIREMENTS}}
    untested = [
        f'{name} {version} (tested: {tested[name]})'
        for name, version in installed.items()
        if not _fits(version, tested[name])
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
