import csv

import matplotlib.image
import pytest
from helpers import import_models
from tool_runs import ROOT, run_here, tool

TOOL = 'benchmarks/stem_lr_sweep.py'


@pytest.fixture
def trainings(monkeypatch):
    """What would be trained, and better the nearer the multiplier is to 0.5."""
    import_models('mmpretrain')
    module, found = tool(TOOL), []

    def train(config, options, work_dir, metric):
        found.append((config, options))
        multiplier, seed = options[module.OPTION], options['randomness.seed']
        value = 0.8 - abs(multiplier - 0.5) / 10 + seed / 100
        unit = 100 if 'accuracy' in metric else 1
        return module.Training(value * unit, 12.0, 12.0, None, 'cpu', 1, [])

    monkeypatch.setattr(module, 'train', train)
    monkeypatch.setattr(module, 'check_data', lambda task: None)
    monkeypatch.setattr(module, 'checkpoint_of', lambda *args: f'{args[:3]}.pth')
    return found


def test_study(trainings, tmp_path, capsys):
    line = ['--multipliers', 0.5, 1, '--out', tmp_path]
    run_here(TOOL, '--seeds', 2, *line)
    assert len(trainings) == 8
    for config, options in trainings:
        is_detector = 'faster-rcnn' in config.name
        start = options.get('model.backbone.init_cfg.checkpoint')
        assert (start is not None) == is_detector
        assert is_detector or options['model.backbone.block'] == 'orepa'
        if is_detector:
            seed = options['randomness.seed']
            assert start == f'{("detector", "orepa", seed)}.pth'
    with (tmp_path / 'results.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['stem_lr_mult'] for row in rows} == {'0.5', '1'}
    tables = (tmp_path / 'results.md').read_text()
    assert '| 0.5 | 80.50 ± 0.71 | +5.00 [+5.00, +5.00] | 2 |' in tables
    assert matplotlib.image.imread(tmp_path / 'results.png').ndim == 3
    assert tables in capsys.readouterr().out + '\n'

    # Goes on with a third seed.
    run_here(TOOL, '--seeds', 3, *line, '--tasks', 'detector')
    assert len(trainings) == 10
    run_here(TOOL, '--report-only', '--out', tmp_path)
    assert len(trainings) == 10


def test_document_has_these_figures():
    module = tool(TOOL)
    rows = ROOT / 'docs/evidence/stem_lr_sweep/results.csv'
    results = module.Results(rows, module.KEY, module.VALUES)
    assert module.to_markdown(results) in (ROOT / 'docs/transfer.md').read_text()
