import importlib
import re

import pytest

from mmorepa.utils import requirements
from mmorepa.utils.requirements import check_requirements

ADVICE = {
    'mmengine': 'pip install mmengine==0.10.7` (OpenMMLab) or `pip install onedl-',
    'mmcv': 'pip install mmcv==2.1.0` (OpenMMLab) or `pip install onedl-mmcv==',
    'torch': 'install it as https://pytorch.org says',
}


@pytest.fixture
def version(monkeypatch):
    """Sets the version that a package says it has."""
    return lambda name, value: monkeypatch.setattr(
        importlib.import_module(name), '__version__', value
    )


TESTED = [
    ('mmengine', '0.10.12'),
    ('mmcv', '2.1.0'),
    ('torch', '2.14.1+cu130'),
]


@pytest.mark.parametrize('name, value', TESTED)
def test_tested(version, name, value, recwarn):
    version(name, value)
    check_requirements()
    assert not recwarn


@pytest.mark.parametrize(
    'name, value',
    [
        ('mmengine', '0.10.0'),
        ('torch', '2.15.0+cu130'),
    ],
)
def test_fits_and_is_not_tested(version, name, value):
    version(name, value)
    with pytest.warns(UserWarning, match=re.escape(f'with {name} {value} (tested: ')):
        check_requirements()


def test_python_that_is_not_tested(monkeypatch):
    monkeypatch.setattr(requirements.platform, 'python_version', lambda: '3.14.0')
    with pytest.warns(UserWarning, match=r'with Python 3.14.0 \(tested: >=3.10'):
        check_requirements()


@pytest.mark.parametrize(
    'name, value, bounds',
    [
        ('mmengine', '1.0.0', '>=0.10.0,<1.0.0'),
        ('mmcv', '2.0.0rc4', '>=2.0.0,<3.0.0'),
        ('mmcv', '10.0.0', '>=2.0.0,<3.0.0'),
        ('torch', '2.5.1', '>=2.6'),
    ],
)
def test_does_not_fit(version, name, value, bounds):
    version(name, value)
    with pytest.raises(ImportError) as info:
        check_requirements()
    text = str(info.value)
    assert text.startswith(f'mmorepa needs {name}{bounds}, found {value}; ')
    assert ADVICE[name] in text


@pytest.mark.parametrize('name', ADVICE)
def test_missing(monkeypatch, name):
    def missing(module):
        if module == name:
            raise ModuleNotFoundError(f'No module named {module!r}', name=module)
        return importlib.import_module(module)

    monkeypatch.setattr(requirements, 'import_module', missing)
    with pytest.raises(ImportError) as info:
        check_requirements()
    assert str(info.value).startswith(f'mmorepa needs {name}, which is missing; ')
    assert ADVICE[name] in str(info.value)


def test_broken_package(monkeypatch):
    """Something that mmcv itself misses is not reported as mmcv."""

    def broken(module):
        if module == 'mmcv':
            raise ModuleNotFoundError("No module named 'cv2'", name='cv2')
        return importlib.import_module(module)

    monkeypatch.setattr(requirements, 'import_module', broken)
    with pytest.raises(ModuleNotFoundError, match="No module named 'cv2'"):
        check_requirements()
