"""The versions of the packages that mmorepa imports."""

from importlib import import_module
from typing import NamedTuple


class _Requirement(NamedTuple):
    module: str
    minimum: str
    limit: str
    install: tuple[str, ...]


_REQUIREMENTS = (
    _Requirement(
        'mmengine', '0.10.0', '1.0.0', ('mmengine==0.10.7', 'onedl-mmengine==0.10.12')
    ),
    _Requirement('mmcv', '2.0.0', '3.0.0', ('mmcv==2.1.0', 'onedl-mmcv==2.3.6')),
)


def check_requirements() -> None:
    """Checks that MMEngine and MMCV are there, in versions that fit.

    Raises:
        ImportError: If one is missing or does not fit. The message names what to
            install.
    """
    for requirement in _REQUIREMENTS:
        name, minimum, limit, (original, fork) = requirement
        advice = (
            f'install it with `pip install {original}` (OpenMMLab) or '
            f'`pip install {fork}` (OneDL), the same family as your other packages'
        )
        try:
            version = import_module(name).__version__
            from mmengine.utils import digit_version
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(
                f'mmorepa needs {name}, which is missing; {advice}'
            ) from error
        if not (
            digit_version(minimum) <= digit_version(version) < digit_version(limit)
        ):
            raise ImportError(
                f'mmorepa needs {name} >= {minimum}, < {limit}, found {version}; '
                f'{advice}'
            )
