"""The versions of the packages that mmorepa imports."""

from importlib import import_module
from typing import NamedTuple


class _Requirement(NamedTuple):
    module: str
    versions: str
    advice: str


_EITHER = (
    'install it with `pip install {}` (OpenMMLab) or `pip install {}` (OneDL), the '
    'same family as your other packages'
)
_REQUIREMENTS = (
    _Requirement(
        'mmengine',
        '>=0.10.0,<1.0.0',
        _EITHER.format('mmengine==0.10.7', 'onedl-mmengine==0.10.12'),
    ),
    _Requirement(
        'mmcv',
        '>=2.0.0,<3.0.0',
        _EITHER.format('mmcv==2.1.0', 'onedl-mmcv==2.3.6'),
    ),
    # The first that takes a name along with what a checkpoint may call by it.
    _Requirement('torch', '>=2.6', 'install it as https://pytorch.org says'),
)


def check_requirements() -> None:
    """Checks that MMEngine, MMCV and PyTorch are there, in versions that fit.

    Raises:
        ImportError: If one is missing or does not fit. The message names what to
            install.
    """
    for name, versions, advice in _REQUIREMENTS:
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
