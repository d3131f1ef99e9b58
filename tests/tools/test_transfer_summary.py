import json
import subprocess

import pytest
from tool_runs import ROOT, tool


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    module = tool('quickstart.py')
    monkeypatch.setattr(module, 'WORK', tmp_path)
    monkeypatch.setattr(module, 'SUMMARY', tmp_path / 'summary.json')
    return module


def write_results(folder):
    for task, metrics in (
        ('det', ({'coco/bbox_mAP': 0.5}, {'coco/bbox_mAP': 0.501})),
        ('seg', ({'mIoU': 62.5, 'aAcc': 90.0}, {'mIoU': 62.4, 'aAcc': 90.0})),
    ):
        (folder / task).mkdir()
        for form, values in zip(('test', 'test_deploy'), metrics):
            (folder / task / f'{form}.json').write_text(json.dumps(values))


def test_appends(quickstart, tmp_path, capsys):
    (tmp_path / 'summary.json').write_text('{"train_top1": 98.3, "det_ap": 0.1}')
    write_results(tmp_path)
    quickstart.summarize_transfer(dict(det=10, seg=20))
    assert json.loads((tmp_path / 'summary.json').read_text()) == dict(
        train_top1=98.3,
        det_ap=0.5,
        det_ap_deploy=0.501,
        seg_miou=0.625,
        seg_miou_deploy=pytest.approx(0.624),
        det_seconds=10,
        seg_seconds=20,
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['box', 'AP', '(0.5:0.95)', '0.5000', '0.5010', '10'] in rows
    assert ['mIoU', '0.6250', '0.6240', '20'] in rows


def test_nothing_is_written_without_all_results(quickstart, tmp_path):
    (tmp_path / 'summary.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='det'):
        quickstart.summarize_transfer(dict(det=10, seg=20))
    assert (tmp_path / 'summary.json').read_text() == '{}'


def test_quickstart_knows_its_arguments():
    done = subprocess.run(
        ['bash', 'tools/quickstart.sh', 'tranfser'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unknown argument 'tranfser'; known is 'transfer'" in done.stderr


def test_quickstart_names_configs_that_are_there():
    quickstart = tool('quickstart.py')
    configs = [config for _, config, *_ in quickstart.TASKS.values()]
    for path in (quickstart.CONFIG, quickstart.PLAIN_CONFIG, *configs):
        assert path.is_file()
