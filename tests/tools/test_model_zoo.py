"""The model zoo and the metafiles: complete, true, and honest about their source."""

import re

import pytest
import yaml
from helpers import import_models
from tool_runs import ROOT, tool

TOOL = 'analysis_tools/model_zoo.py'
CONFIGS = sorted((ROOT / 'configs' / 'imagenet').glob('*.py'))
METAFILE = ROOT / 'configs' / 'imagenet' / 'metafile.yml'
MODEL_INDEX = ROOT / 'model-index.yml'
DOCUMENT = ROOT / 'docs' / 'model_zoo.md'


def rows():
    """The rows of the document by config name: texts of the cells."""
    lines = [ln for ln in DOCUMENT.read_text().splitlines() if ln.startswith('| [')]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    return {re.match(r'\[([^]]*)\]', row[0])[1]: row for row in cells}


def figure(cell):
    return float(cell.split(' ')[0])


@pytest.fixture(scope='module')
def metafile():
    return yaml.safe_load(METAFILE.read_text())


@pytest.mark.parametrize('name', ['resnet18-orepa', 'resnet18-dbb', 'repvgg-a0-orepa'])
def test_figures_are_those_of_the_models(name, metafile):
    import_models('mmpretrain')
    (path,) = [path for path in CONFIGS if path.stem.startswith(f'{name}_')]
    entry = tool(TOOL).measure(path)
    row = rows()[name]
    assert [figure(cell) for cell in row[1:6]] == [
        round(entry['params'] / 1e6, 2),
        round(entry['gflops'], 2),
        round(entry['deployed_params'] / 1e6, 2),
        round(entry['deployed_gflops'], 2),
        round(entry['deployed_megabytes'], 1),
    ]
    (model,) = [m for m in metafile['Models'] if m['Name'] == path.stem]
    assert model['Metadata'] == dict(
        FLOPs=round(entry['deployed_gflops'] * 1e9), Parameters=entry['deployed_params']
    )


class TestMetafile:
    def test_model_index(self):
        modelindex = pytest.importorskip('modelindex.load_model_index')
        index = modelindex.load(str(MODEL_INDEX))
        index.build_models_with_collections()
        models = list(index.models)
        assert len(models) == len(CONFIGS)
        for model in models:
            assert (ROOT / model.config).is_file()
            assert model.metadata.parameters > 8e6
            whole = model.full_model  # with what its collection says
            assert (whole.metadata.epochs, whole.metadata.batch_size) == (120, 256)
            assert whole.paper['URL'] == 'https://arxiv.org/abs/2204.00826'
