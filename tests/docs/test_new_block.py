"""The block type that docs/new_block.md adds, as a reader would add it."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, deployed_twin, trained_like
from mmengine.config import Config
from mmengine.registry import MODELS

from mmorepa.layers import BLOCKS, is_switchable

TEXT = (Path(__file__).parents[2] / 'docs' / 'new_block.md').read_text()
CODE = re.findall(r'```python\n(.*?)```', TEXT, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def forgotten(registries):
    yield
    sys.modules.pop('cross', None)


def run(*blocks):
    """Runs code blocks of the document in order; the names that they define."""
    names = {'__name__': 'new_block'}
    for number, code in enumerate(blocks):
        exec(compile(code, f'docs/new_block.md[{number}]', 'exec'), names)
    return names


def test_all_of_it_runs():
    assert 'cross' not in BLOCKS.module_dict
    names = run(*CODE)
    assert not is_switchable(names['network'])
    fresh = MODELS.build(dict(type='OREPAResNet', depth=18, block='cross'))
    assert names['CrossConv2d'] in {type(m) for m in fresh.modules()}


def reference(kernel, x, **geometry):
    """Each of the three kernels on the feature map, with padding of its own."""
    reach = kernel.square.shape[-1] // 2
    return (
        F.conv2d(x, kernel.square, padding=(reach, reach), **geometry)
        + F.conv2d(x, kernel.row, padding=(0, reach), **geometry)
        + F.conv2d(x, kernel.column, padding=(reach, 0), **geometry)
    )


@pytest.mark.parametrize('geometry', [dict(), dict(groups=2, stride=2)])
@pytest.mark.parametrize('size', [1, 3])
def test_is_the_sum_of_its_branches(geometry, size, float64):
    conv = run(*CODE[:2])['CrossConv2d'](
        4, 6, size, padding=size // 2, norm_cfg=dict(type='BN'), **geometry
    )
    trained_like(conv).eval()
    x = torch.randn(2, 4, 9, 8)
    expected = reference(conv.branches, x, **geometry) + conv.bias[:, None, None]
    expected = conv.norm(expected)
    assert_near(conv(x), expected, 1e-12)
    assert_near(deployed_twin(conv)(x), expected, 1e-12)


def test_in_a_config(tmp_path, monkeypatch):
    """'If the file above is among its custom_imports'."""
    (tmp_path / 'cross.py').write_text('\n'.join(CODE[:2]))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / 'config.py'
    config.write_text(
        "custom_imports = dict(imports=['mmorepa', 'cross'])\n"
        "backbone = dict(type='OREPAResNet', depth=18, block='cross', base_channels=4)"
    )
    network = MODELS.build(Config.fromfile(config).backbone)
    assert type(network.layer1[0].conv1).__name__ == 'CrossConv2d'
