"""Every Python block of the documents runs: as a config, as part of one, or as code."""

import ast
from importlib import metadata

import pytest
import torch
from documents import DOCUMENTS, NAMES, code_blocks, printed_configs
from helpers import import_models
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODEL_WRAPPERS
from tool_runs import ROOT

import mmorepa
from mmorepa.hub import get_config
from mmorepa.runs import build_model, check_data_folders

# What a config may be a part of, where a document does not name its _base_.
BASES = {'docs/transfer.md': 'coco/faster-rcnn_r50-orepa_fpn_1x_coco.py'}
BASE = 'imagenet/resnet50-orepa_4xb64_in1k.py'
ENTRIES = {'model', 'backbone', 'optim_wrapper', 'custom_hooks', 'model_wrapper_cfg'}


def names_of(code):
    """What a block assigns, or nothing if it does anything else."""
    body = ast.parse(code).body
    if not all(isinstance(statement, ast.Assign) for statement in body):
        return set()
    return {target.id for statement in body for target in statement.targets}


def is_config(code):
    return '_base_' in names_of(code)


def is_part(code):
    return bool(names_of(code)) and names_of(code) <= ENTRIES


BLOCKS = {
    name: code_blocks(path.read_text(), 'python')
    for name, path in zip(NAMES, DOCUMENTS)
    # test_new_block.py runs these, and takes back what they register.
    if name != 'docs/new_block.md'
}


def each(choose):
    """Parametrizes by the blocks of a kind, as pairs of document and code."""
    pairs = [(n, code) for n, codes in BLOCKS.items() for code in codes if choose(code)]
    return pytest.mark.parametrize(
        ('name', 'code'),
        pairs,
        ids=[f'{name}-{i}' for i, (name, _) in enumerate(pairs)],
    )


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Reads a config that stands in the root of the repository."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)

    def read(code):
        if '::' in code and _is_onedl():
            pytest.skip("the OneDL forks know no '_base_' of another package")
        (tmp_path / 'my_config.py').write_text(code)
        return get_config('my_config.py')

    return read


def _is_onedl():
    return any(d.metadata['Name'] == 'onedl-mmengine' for d in metadata.distributions())


def check(cfg, has_weights=False):
    """The model and its optimizer as the config has them."""
    import_models(cfg.default_scope)
    # The toolboxes' own networks compute with tensors while they are built.
    has_weights = has_weights or not cfg.model.backbone.type.startswith('OREPA')
    with torch.device('cpu' if has_weights else 'meta'):
        model = build_model(cfg)
    if cfg.model.backbone.get('deploy'):
        assert not mmorepa.is_switchable(model)
        return model, None
    return model, build_optim_wrapper(model, cfg.optim_wrapper)


@pytest.mark.slow
@each(is_config)
def test_configs(name, code, load):
    _, wrapper = check(load(code))
    assert type(wrapper).__name__ == 'FoldedOptimWrapper'


@pytest.mark.slow
@each(is_part)
def test_parts_of_configs(name, code):
    values = {}
    exec(code, values)
    entries = {key: values[key] for key in names_of(code) - {'backbone'}}
    cfg = Config.fromfile(ROOT / 'configs' / BASES.get(name, BASE))
    cfg.merge_from_dict(entries)
    for hook in entries.get('custom_hooks', []):
        HOOKS.build(hook)
    if 'model_wrapper_cfg' in entries:
        assert MODEL_WRAPPERS.get(entries['model_wrapper_cfg']['type'])
    if entries.keys() & {'model', 'optim_wrapper'}:
        check(cfg)


# test_onnx.py, and tests/tools/test_predict.py, run what takes these files.
FILES = ("'image.png'", "'network_int8.pt2'", "'rose.jpg'")
CODES = {
    name: [
        code
        for code in codes
        if not is_config(code)
        and not is_part(code)
        and not any(name in code for name in FILES)
    ]
    for name, codes in BLOCKS.items()
}


@pytest.mark.parametrize('name', [name for name, codes in CODES.items() if codes])
def test_code(name, tmp_path, monkeypatch):
    """In the order of the document, each block after those before it."""
    codes = CODES[name]
    if any('onnx' in code for code in codes):
        for package in ('onnx', 'onnxruntime'):
            pytest.importorskip(package)
    pytest.importorskip('torchvision')
    for file, code in printed_configs((ROOT / name).read_text()).items():
        (tmp_path / file).write_text(code)
    monkeypatch.chdir(tmp_path)
    values = {'__name__': 'document'}
    for number, code in enumerate(codes):
        exec(compile(code, f'{name}[{number}]', 'exec'), values)


def test_readme_trains_a_step(load):
    """Its config, as it is printed, on images that are drawn."""
    (code,) = (code for code in BLOCKS['README.md'] if is_config(code))
    cfg = load(code)
    check_data_folders(cfg, ('train', 'val'))  # Not there, and downloaded.
    model, wrapper = check(cfg, has_weights=True)
    structures = pytest.importorskip('mmpretrain.structures')
    samples = [structures.DataSample().set_gt_label(label) for label in range(4)]
    images = torch.randint(256, (4, 3, 32, 32)).float()
    losses = [
        model.train().train_step(dict(inputs=images, data_samples=samples), wrapper)
        for _ in range(4)
    ]
    assert losses[-1]['loss'] < losses[0]['loss']
