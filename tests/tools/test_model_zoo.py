"""The model zoo and the metafiles: complete, true, and honest about their source."""

import re

import pytest
import yaml
from helpers import import_models
from tool_runs import ROOT, command, run_apart, run_here, tool

import mmorepa

TOOL = 'analysis_tools/model_zoo.py'
CONFIGS = sorted((ROOT / 'configs' / 'imagenet').glob('*.py'))
METAFILE = ROOT / 'configs' / 'imagenet' / 'metafile.yml'
MODEL_INDEX = ROOT / 'model-index.yml'
DOCUMENT = ROOT / 'docs' / 'model_zoo.md'

# The tables of the paper: top-1 (%), memory (GB), seconds a batch.
PAPER = {
    'resnet18': (71.21, 4.2, 0.086),
    'resnet18-dbb': (71.77, 7.5, 0.241),
    'resnet18-orepa': (72.13, 5.2, 0.120),
    'resnet34': (74.13, 5.2, 0.116),
    'resnet34-dbb': (74.83, 11.1, 0.424),
    'resnet34-orepa': (75.04, 6.7, 0.182),
    'resnet50': (76.70, 10.3, 0.204),
    'resnet50-dbb': (76.89, 13.7, 0.380),
    'resnet50-orepa': (77.31, 11.2, 0.252),
    'resnet101': (77.71, 14.5, 0.382),
    'resnet101-dbb': (78.02, 19.7, 0.641),
    'resnet101-orepa': (78.29, 16.1, 0.445),
    'resnext50-32x4d': (77.14, 12.4, 0.286),
    'resnext50-32x4d-orepa': (77.66, 13.0, 0.343),
    'resnet18-1.5x': (73.69, 6.0, 0.121),
    'resnet18-1.5x-orepa': (74.51, 7.4, 0.164),
    'resnet18-2x': (74.74, 7.4, 0.161),
    'resnet18-2x-orepa': (75.61, 10.4, 0.229),
    'repvgg-a0': (72.41, 3.8, 0.100),
    'repvgg-a0-orepa': (73.04, 4.2, 0.136),
    'repvgg-a1': (74.46, 4.8, 0.121),
    'repvgg-a1-orepa': (74.85, 5.5, 0.147),
    'repvgg-a2': (76.48, 5.8, 0.170),
    'repvgg-a2-orepa': (76.72, 7.4, 0.210),
}
# As published by their own authors: parameters (millions) and GFLOPs, in training form
# for ResNets (torchvision) and deployed for RepVGGs.
KNOWN = {
    'resnet18': (0, 11.69, 1.82),
    'resnet34': (0, 21.80, 3.67),
    'resnet50': (0, 25.56, 4.11),
    'resnet101': (0, 44.55, 7.83),
    'resnext50-32x4d': (0, 25.03, 4.26),
    'repvgg-a0': (2, 8.31, 1.36),
    'repvgg-a1': (2, 12.79, 2.36),
    'repvgg-a2': (2, 25.50, 5.12),
    'repvgg-b1': (2, 51.83, 11.82),
}


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


class TestDocument:
    def test_every_config_has_its_row(self):
        links = [re.search(r'\(\.\./(.*)\)', row[0])[1] for row in rows().values()]
        expected = [str(path.relative_to(ROOT)) for path in CONFIGS]
        assert sorted(links) == expected and len(expected) == 26
        for name, link in zip(rows(), links):
            assert link.startswith(f'configs/imagenet/{name}_')

    def test_figures_of_the_paper(self):
        """All of them, in columns that say whose they are."""
        text = DOCUMENT.read_text()
        header = next(line for line in text.splitlines() if line.startswith('| config'))
        columns = [column.strip() for column in header.strip('|').split('|')]
        assert [c for c in columns if "paper's" in c] == columns[-3:]
        assert "**the paper's figures**" in text
        assert 'not results of this repository' in ' '.join(text.split())
        for name, row in rows().items():
            if name in PAPER:
                assert tuple(map(figure, row[-3:])) == PAPER[name], name
            else:
                assert row[-3:] == ['–'] * 3, name
        assert PAPER.keys() < rows().keys()
        assert tool(TOOL).PAPER == PAPER

    @pytest.mark.parametrize('name', KNOWN)
    def test_figures_that_are_known(self, name):
        """Held against the literature, to rounding of the counts."""
        form, params, gflops = KNOWN[name]
        row = rows()[name]
        assert figure(row[1 + form]) == pytest.approx(params, abs=0.011)
        assert figure(row[2 + form]) == pytest.approx(gflops, rel=0.01)

    def test_forms(self):
        """Deployed, all blocks of one network are the same; branches come on top."""
        table = rows()
        for name, row in table.items():
            base = re.sub('-(orepa|dbb)$', '', name)
            assert row[3:6] == table[base][3:6]
            megabytes = figure(row[5])
            assert megabytes == pytest.approx(4 * figure(row[3]), rel=0.005)
            if base != name:
                assert figure(row[1]) > 1.5 * figure(table[base][1])
            if name.endswith('-orepa'):
                assert figure(row[2]) == figure(table[base][2])
            if name.endswith('-dbb'):
                assert figure(row[2]) > 1.5 * figure(table[base][2])


@pytest.mark.parametrize('name', ['resnet18-orepa', 'resnet18-dbb', 'repvgg-a0-orepa'])
def test_figures_are_those_of_the_models(name, metafile):
    import_models('mmpretrain')
    (path,) = [path for path in CONFIGS if path.stem.startswith(f'{name}_')]
    entry = tool(TOOL).measure(path)
    row = rows()[name]
    assert [figure(cell) for cell in row[1:6]] == [
        round(entry.params / 1e6, 2),
        round(entry.gflops, 2),
        round(entry.deployed_params / 1e6, 2),
        round(entry.deployed_gflops, 2),
        round(entry.deployed_megabytes, 1),
    ]
    (model,) = [m for m in metafile['Models'] if m['Name'] == path.stem]
    assert model['Metadata'] == dict(
        FLOPs=round(entry.deployed_gflops * 1e9), Parameters=entry.deployed_params
    )


class TestMetafile:
    def test_every_config_is_listed(self, metafile):
        assert [model['Config'] for model in metafile['Models']] == [
            str(path.relative_to(ROOT)) for path in CONFIGS
        ]
        names = [model['Name'] for model in metafile['Models']]
        assert names == [path.stem for path in CONFIGS]
        assert len({name.lower() for name in names}) == len(names)

    def test_figures_of_the_paper(self, metafile):
        for model in metafile['Models']:
            name = model['Name'].split('_')[0]
            assert 'Weights' not in model
            results = model.get('Results', [])
            if name not in PAPER:
                assert not results
                continue
            (result,) = results
            assert result['Metrics'] == {'Top 1 Accuracy': PAPER[name][0]}

    def test_is_that_of_the_document(self, metafile):
        table = rows()
        for model in metafile['Models']:
            row = table[model['Name'].split('_')[0]]
            metadata = model['Metadata']
            assert figure(row[3]) == round(metadata['Parameters'] / 1e6, 2)
            assert figure(row[4]) == round(metadata['FLOPs'] / 1e9, 2)

    def test_collections(self, metafile):
        names = {collection['Name'] for collection in metafile['Collections']}
        for collection in metafile['Collections']:
            assert (ROOT / collection['README']).is_file()
        for model in metafile['Models']:
            kind = 'OREPARepVGG' if 'repvgg' in model['Name'] else 'OREPAResNet'
            assert model['In Collection'] == kind
            assert kind in names

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

    def test_model_hub(self):
        """By name in mmpretrain, beside its own models."""
        import_models('mmpretrain')
        from mmpretrain.apis import ModelHub, get_model

        mmorepa.register_models()
        ModelHub.get('resnet18_8xb32_in1k')
        for path in CONFIGS:
            found = ModelHub.get(path.stem)
            assert found.config.filename == str(path)
        model = get_model('repvgg-a0_4xb64_in1k')
        assert type(model.backbone).__name__ == 'OREPARepVGG'
        assert model._metainfo.name == 'repvgg-a0_4xb64_in1k'


class TestTool:
    def test_only(self, capsys):
        """Prints the rows of the document, and writes nothing."""
        import_models('mmpretrain')
        before = DOCUMENT.stat().st_mtime_ns, METAFILE.stat().st_mtime_ns
        run_here(TOOL, '--only', 'repvgg-a0')
        (line,) = capsys.readouterr().out.splitlines()
        assert line in DOCUMENT.read_text().splitlines()
        assert line.startswith('| [repvgg-a0](../configs/imagenet/repvgg-a0_4xb64')
        assert (DOCUMENT.stat().st_mtime_ns, METAFILE.stat().st_mtime_ns) == before

    def test_unknown_name(self):
        with pytest.raises(SystemExit) as caught:
            run_here(TOOL, '--only', 'resnet18', 'resnet19', 'vgg')
        assert caught.value.code == 'error: no config of the name resnet19, vgg'

    @pytest.mark.slow
    def test_command_line(self):
        done = run_apart(*command(TOOL, '--only', 'resnet18', 'resnet18-orepa'))
        assert done.returncode == 0, done.stderr
        lines = DOCUMENT.read_text().splitlines()
        assert len(done.stdout.splitlines()) == 2
        assert all(line in lines for line in done.stdout.splitlines())

    @pytest.mark.slow
    def test_writes_what_is_committed(self, tmp_path, monkeypatch):
        """From nothing, to the letter: no figure has been left behind."""
        import_models('mmpretrain')
        module = tool(TOOL)
        monkeypatch.setattr(module, 'ROOT', tmp_path)
        for path, name in ((DOCUMENT, 'DOCUMENT'), (METAFILE, 'METAFILE')):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True)
            monkeypatch.setattr(module, name, copy)
        (tmp_path / 'configs' / '_base_').symlink_to(ROOT / 'configs' / '_base_')
        for path in CONFIGS:
            (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
        monkeypatch.setattr(module, 'CONFIGS', tmp_path / 'configs' / 'imagenet')
        run_here(TOOL)
        for path in (DOCUMENT, METAFILE):
            written = tmp_path / path.relative_to(ROOT)
            assert written.read_text() == path.read_text()
        # And no temporary file is left.
        assert [p.name for p in (tmp_path / 'docs').iterdir()] == ['model_zoo.md']
