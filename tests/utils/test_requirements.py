import importlib
import re

import pytest

from mmorepa.utils import requirements
from mmorepa.utils.requirements import check_requirements

# What an error proposes.
ADVICE = {'mmengine': 'onedl-', 'mmcv': 'onedl-mmcv', 'torch': 'install torch'}


@pytest.fixture
def version(monkeypatch):
    """Sets the version that a package says it has."""

    def set_version(name, value):
        if name == 'Python':
            monkeypatch.setattr(requirements.platform, 'python_version', lambda: value)
        else:
            monkeypatch.setattr(importlib.import_module(name), '__version__', value)

    return set_version


@pytest.mark.parametrize(
    'name, value',
    [('mmengine', '0.10.12'), ('mmcv', '2.1.0'), ('torch', '2.14.1+cu130')],
)
def test_tested(version, name, value, recwarn):
    version(name, value)
    check_requirements()
    assert not recwarn


@pytest.mark.parametrize(
    'name, value',
    [('mmengine', '0.10.0'), ('torch', '2.15.0+cu130'), ('Python', '3.14.0')],
)
def test_fits_and_is_not_tested(version, name, value):
    version(name, value)
    with pytest.warns(UserWarning, match=re.escape(f'{name} {value} (tested: ')):
        check_requirements()


@pytest.mark.parametrize(
    'name, value',
    [
        ('mmengine', '1.0.0'),
        ('mmcv', '2.0.0rc4'),
        ('mmcv', '10.0.0'),
        ('torch', '2.5.1'),
    ],
)
def test_does_not_fit(version, name, value):
    version(name, value)
    words = f'{name}.*found {re.escape(value)}.*{ADVICE[name]}'
    with pytest.raises(ImportError, match=words):
        check_requirements()


# What mmcv itself misses is not reported as mmcv.
@pytest.mark.parametrize('name, missing', [*zip(ADVICE, ADVICE), ('mmcv', 'cv2')])
def test_missing(monkeypatch, name, missing):
    def import_module(module):
        if module == name:
            raise ModuleNotFoundError(f'No module named {missing!r}', name=missing)
        return importlib.import_module(module)

    monkeypatch.setattr(requirements, 'import_module', import_module)
    words = "No module named 'cv2'"
    if missing == name:
        words = f'needs {name}, which is missing.*{ADVICE[name]}'
    with pytest.raises(ImportError, match=words):
        check_requirements()
