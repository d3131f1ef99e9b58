"""The block type that docs/new_block.md adds, as a reader would add it."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, deployed_twin, gradcheck, import_models, trained_like
from mmengine.config import Config
from mmengine.registry import MODELS

import mmorepa
from mmorepa.layers import BLOCKS, is_switchable

TEXT = (Path(__file__).parents[2] / 'docs' / 'new_block.md').read_text()
CODE = re.findall(r'```python\n(.*?)```', TEXT, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def restored():
    """Registries are those of before, after every test."""
    before = [(registry, dict(registry._module_dict)) for registry in (BLOCKS, MODELS)]
    yield
    for registry, modules in before:
        registry._module_dict.clear()
        registry._module_dict.update(modules)
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
    assert len(CODE) == 3
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


@pytest.mark.parametrize(
    'geometry', [dict(), dict(stride=2), dict(groups=2), dict(groups=2, stride=2)]
)
@pytest.mark.parametrize('size', [1, 3, 5])
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


def test_gradients(float64):
    conv = run(*CODE[:2])['CrossConv2d'](4, 6, 3, groups=2)
    parameters = dict(conv.branches.named_parameters())
    assert parameters.keys() == {'square', 'row', 'column'}

    def kernel(*tensors):
        return torch.func.functional_call(
            conv.branches, dict(zip(parameters, tensors)), ()
        )

    assert gradcheck(kernel, tuple(parameters.values()))
    x = torch.randn(1, 4, 5, 5)
    target = torch.randn(1, 6, 3, 3)
    online = torch.autograd.grad((conv(x) * target).sum(), parameters.values())
    direct = F.conv2d(x, conv.branches(), conv.bias, groups=2)
    expected = torch.autograd.grad((direct * target).sum(), parameters.values())
    assert_near(online, expected, 1e-12)


@pytest.mark.parametrize('type_', ['OREPAResNet', 'OREPARepVGG'])
def test_in_every_network(type_):
    """Both forms of a network with a state that is not the initial one."""
    names = run(*CODE[:2])
    size = dict(depth=50) if type_ == 'OREPAResNet' else dict(arch='A0')
    network = MODELS.build(dict(type=type_, block='cross', base_channels=8, **size))
    convs = [m for m in network.modules() if isinstance(m, names['CrossConv2d'])]
    assert len(convs) == (16 if type_ == 'OREPAResNet' else 22)
    trained_like(network).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(deployed_twin(network)(x), network(x), 1e-4)


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


def test_as_a_conv_cfg():
    """'The conv is a type of conv_cfg, too'."""
    import_models('mmpretrain')
    assert "`conv_cfg=dict(type='CrossConv2d')`" in TEXT
    names = run(*CODE[:2])
    network = MODELS.build(
        dict(
            type='mmpretrain.ResNet',
            depth=50,
            base_channels=4,
            stem_channels=4,
            conv_cfg=dict(type='CrossConv2d'),
        )
    )
    convs = [m for m in network.modules() if isinstance(m, names['CrossConv2d'])]
    assert {conv.kernel_size for conv in convs} == {(1, 1), (3, 3), (7, 7)}
    assert len(convs) == 53
    trained_like(network).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(deployed_twin(network)(x), network(x), 1e-4)


def test_what_it_names_exists():
    """In the text, beside what test_documents.py looks for."""
    for name in re.findall(r'`(\w+Conv2d)`', TEXT):
        assert name in vars(mmorepa.layers), name
    assert {'BRANCH_NAMES', 'build_branch'} <= vars(
        mmorepa.layers.MultiBranchConv2d
    ).keys()
    for word in ('BRANCH_NAMES', 'build_branch', 'MultiBranchConv2d'):
        assert f'`{word}`' in TEXT
