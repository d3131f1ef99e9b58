"""The commands that the quickstart runs, in this process and at a small size."""

import json

import pytest
from tool_runs import run_here, run_name, skip_timing, tool


@pytest.mark.slow
def test_quickstart(config, tmp_path, monkeypatch):
    def run(name, *args):
        if name == 'train.py':
            args = [*args, run_name()]
        elif name == 'test.py':
            args = [*args, '--cfg-options', run_name()]
        if not name.startswith('dataset_converters'):
            run_here(name, *args)

    plain = tmp_path / 'plain.py'
    plain.write_text(
        f"_base_ = {str(config)!r}\nmodel = dict(backbone=dict(block='plain'))\n"
    )
    quickstart, summary = tool('quickstart.py'), 'analysis_tools/quickstart_summary.py'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, 'run', run)
    monkeypatch.setattr(quickstart, 'CONFIG', config)
    monkeypatch.setattr(quickstart, 'PLAIN_CONFIG', plain)
    skip_timing(monkeypatch)
    monkeypatch.setattr(tool(summary), 'least_seconds', lambda f: ([0.1] * len(f), 1.0))
    quickstart.main(['--epochs', '1'])
    figures = json.loads((tmp_path / 'work_dirs/quickstart/summary.json').read_text())
    assert figures['params_deploy'] < figures['params_train']
    assert figures['train_top1'] == pytest.approx(figures['deploy_top1'], abs=0.3)
