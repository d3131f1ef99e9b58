import json
import subprocess

import pytest
from tool_runs import ROOT, run_here

SUMMARY = 'analysis_tools/transfer_summary.py'


def write_results(folder):
    for task, metrics in (
        ('det', ({'coco/bbox_mAP': 0.5}, {'coco/bbox_mAP': 0.501})),
        ('seg', ({'mIoU': 62.5, 'aAcc': 90.0}, {'mIoU': 62.4, 'aAcc': 90.0})),
    ):
        (folder / task).mkdir()
        for form, values in zip(('test', 'test_deploy'), metrics):
            (folder / task / f'{form}.json').write_text(json.dumps(values))


def test_appends(tmp_path, capsys):
    (tmp_path / 'summary.json').write_text('{"train_top1": 98.3, "det_ap": 0.1}')
    write_results(tmp_path)
    run_here(SUMMARY, tmp_path, '--det-seconds=10', '--seg-seconds=20')
    assert json.loads((tmp_path / 'summary.json').read_text()) == dict(
        train_top1=98.3,
        det_ap=0.5,
        det_ap_deploy=0.501,
        seg_miou=0.625,
        seg_miou_deploy=pytest.approx(0.624),
        det_seconds=10,
        seg_seconds=20,
    )
    printed = capsys.readouterr().out
    for line in ('det_ap: 0.5000', 'det_ap_deploy: 0.5010', 'seg_miou: 0.6250'):
        assert line in printed
    assert not list(tmp_path.glob('.summary*'))


def test_quickstart_knows_its_arguments():
    done = subprocess.run(
        ['bash', 'tools/quickstart.sh', 'tranfser'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unknown argument 'tranfser'; known is 'transfer'" in done.stderr
