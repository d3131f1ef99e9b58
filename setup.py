import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Returns the version without importing the package, which needs torch."""
    text = (ROOT / 'mmorepa' / 'version.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    if match is None:
        raise ValueError("mmorepa/version.py has no line __version__ = '...'")
    return match.group(1)


def read_long_description() -> str:
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


def read_requirements(name: str) -> list:
    """Returns the requirements in requirements/<name>.txt, comments left out."""
    path = ROOT / 'requirements' / f'{name}.txt'
    lines = (line.strip() for line in path.read_text(encoding='utf-8').splitlines())
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='mmorepa',
    version=read_version(),
    description='Online convolutional re-parameterization (OREPA) for OpenMMLab',
    long_description=read_long_description(),
    long_description_content_type='text/markdown',
    author='The mmorepa authors',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmorepa', 'mmorepa.*']),
    include_package_data=True,
    install_requires=read_requirements('runtime'),
    # mmcv is in none of these: see the requirements files of either stack.
    extras_require={
        name: read_requirements(name)
        for name in ('openmmlab', 'onedl', 'optional', 'tests')
    },
    zip_safe=False,
)
