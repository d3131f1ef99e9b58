import json

import mmcv
import pytest
from tool_runs import run_here, tool

TOOL = 'analysis_tools/quickstart_summary.py'
SECONDS = ('--seconds', 90, '--training-seconds', 60, '--plain-training-seconds', 40)


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    """A folder as tools/quickstart.sh leaves it, of two epochs of three steps."""
    timed = [0.0035, 0.00125, 0.0015], 0.9
    monkeypatch.setattr(tool(TOOL), 'time_forms', lambda *_: timed)
    form = dict(gflops=1.0, megabytes=8.0, latency_ms=99)
    write(tmp_path / 'test.json', {'accuracy/top1': 91.25})
    write(tmp_path / 'test_deploy.json', {'accuracy/top1': 91.5})
    write(
        tmp_path / 'switch.json',
        dict(
            training_form=dict(form, params=2000),
            deployed=dict(form, params=500),
            differences={
                'random input': dict(absolute=9e-1, relative=9e-1),
                'test images': dict(absolute=2e-5, relative=1e-6),
            },
        ),
    )
    write(tmp_path / 'plain/test.json', {'accuracy/top1': 90.75})
    write(
        tmp_path / 'plain/switch.json',
        dict(
            training_form=dict(form, params=600),
            deployed=dict(form, params=501),
        ),
    )
    for folder, time, loss in (
        ('train', '20260101_000000', 9.0),
        ('train', '20260102_000000', 1.0),
        ('plain/train', '20260102_000000', 2.0),
    ):
        lines = []
        for epoch in (1, 2):
            for step in range(3 * epoch - 2, 3 * epoch + 1):
                lines.append(dict(loss=loss / step, epoch=epoch, step=step, iter=step))
            lines.append({'accuracy/top1': 40.0 * epoch, 'step': epoch})
        path = tmp_path / folder / time / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(map(json.dumps, lines)))
    return tmp_path


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def summarize(work_dir):
    run_here(TOOL, work_dir, 'config.py', 'epoch_2.pth', *SECONDS)


def test_deployed_form_is_tested_by_its_own_config(tmp_path, monkeypatch):
    """With no flag: by the one that the switch writes beside the checkpoint."""
    quickstart, calls = tool('quickstart.py'), []
    monkeypatch.setattr(quickstart, 'run', lambda *line, **_: calls.append(line))
    quickstart.deploy('config.py', 'epoch_1.pth', tmp_path, '')
    (name, *before), (_, *switch), (_, *after) = calls
    assert name == 'test.py' and before[:2] == ['config.py', 'epoch_1.pth']
    deployed = str(switch[2])
    beside = tool('model_converters/switch_to_deploy.py').config_beside(deployed)
    assert [str(path) for path in after[:2]] == [beside, deployed]
    assert '--cfg-options' not in after


def test_figures(work_dir, capsys):
    summarize(work_dir)
    assert json.loads((work_dir / 'summary.json').read_text()) == dict(
        train_top1=91.25,
        deploy_top1=91.5,
        plain_top1=90.75,
        max_abs_logit_diff=2e-5,
        params_train=2000,
        params_deploy=500,
        params_plain=501,
        latency_ms_train_form=3.5,
        latency_ms_deploy=1.25,
        latency_ms_plain=1.5,
        core_share=0.9,
        training_seconds=60,
        plain_training_seconds=40,
        seconds=90,
    )
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ['top-1', 'accuracy', '(%)', '91.25', '91.50', '90.75'] in rows
    assert ['parameters', '2,000', '500', '501'] in rows
    assert ['latency', '(ms)', '3.50', '1.25', '1.50'] in rows
    assert '2.0e-05' in text and 'Everything took 90 s' in text
    assert ['training', '(s)', '60', '40'] in rows
    assert str(work_dir / 'summary.json') in text
    assert 'had a core' not in text
    # Something is drawn on the white.
    assert (mmcv.imread(str(work_dir / 'curves.png')) < 200).mean() > 0.005
    assert not list(work_dir.glob('.*'))


@pytest.mark.parametrize(
    'name', ['test.json', 'switch.json', 'train', 'plain/test.json']
)
def test_something_is_missing(work_dir, name):
    (work_dir / name).rename(work_dir / 'gone')
    with pytest.raises(SystemExit, match=f'^error: .*{name}'):
        summarize(work_dir)
    assert not (work_dir / 'summary.json').exists()
    assert not (work_dir / 'curves.png').exists()
