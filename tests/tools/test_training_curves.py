import csv
import json

import mmcv
import pytest
from tool_runs import run_here, tool

pytest.importorskip('matplotlib')
TOOL = 'analysis_tools/training_curves.py'


def write_log(folder, *records, time='20260101_000000'):
    path = folder / time / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, records)))


def train_like(folder, factor=1.0, branches=False):
    """A log of 6 epochs of 2 steps."""
    records = []
    for epoch in range(1, 7):
        step = 2 * epoch
        records.append(dict(loss=factor / step, epoch=epoch, step=step, iter=step))
        if branches:
            statistics = {
                'branch_share/stem.1/origin': 0.25,
                'branch_share/stem.1/average': 0.75,
                'branch_scale/stem.1/origin': 0.1,
                'kernel_step/stem': 0.1 / step,
                'kernel_step/conv': 0.2 / step,
            }
            records.append({**statistics, 'step': step})
        metrics = {'accuracy/top1': 99 - 90 * factor / epoch**4, 'data_time': 0.1}
        records.append({**metrics, 'step': epoch})
    write_log(folder, *records)
    return folder


def test_reads_a_run(tmp_path):
    run = tool(TOOL).read_run(train_like(tmp_path / 'a', branches=True))
    assert run.name == str(tmp_path / 'a') and run.unit == 'epoch'
    assert run.losses == [(epoch, 0.5 / epoch) for epoch in range(1, 7)]
    assert run.metrics.keys() == {'accuracy/top1'}
    assert [x for x, _ in run.metrics['accuracy/top1']] == [1, 2, 3, 4, 5, 6]
    # Its steps are those of the training.
    assert run.branches['kernel_step/stem'][1] == (2, 0.1 / 4)


def test_reads_a_run_that_was_resumed(tmp_path):
    """In iterations; what was done again counts once."""
    folder = tmp_path / 'a'
    for time, first, last in (('1', 1, 5), ('2', 4, 8)):
        steps = range(first, last)
        write_log(folder, *(dict(loss=last, step=i, iter=i) for i in steps), time=time)
    run = tool(TOOL).read_run(folder)
    assert run.name == str(folder) and run.unit == 'iteration'
    assert run.losses == [(i, 5 if i < 4 else 8) for i in range(1, 8)]


def test_draws(tmp_path, capsys):
    runs = [
        train_like(tmp_path / 'a', branches=True),
        train_like(tmp_path / 'b', factor=1.1),
        train_like(tmp_path / 'c'),
    ]
    out, branches = tmp_path / 'out.png', tmp_path / 'branches.png'
    run_here(TOOL, *runs, '--out', out, '--branches', branches)
    for path in (out, branches):
        image = mmcv.imread(str(path))
        assert image.shape[0] > 200 and (image < 200).mean() > 0.005
    with out.with_suffix('.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 12
    assert {row['run'] for row in rows} == {*map(str, runs)}
    assert 'accuracy/top1' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('change', 'error'),
    [
        (lambda folder: ['none'], 'no log'),
        (lambda folder: ['a', '--branches', 'b.png'], 'BranchStatisticsHook'),
        (lambda folder: ['a', 'iterations'], 'count epochs'),
        (lambda folder: ['damaged'], 'damaged'),
        (lambda folder: ['empty'], 'no loss'),
        (lambda folder: ['a'] * 9, 'at most'),
        (lambda folder: ['a', '--out', 'a'], 'a folder'),
    ],
)
def test_errors(tmp_path, monkeypatch, change, error):
    monkeypatch.chdir(tmp_path)
    train_like(tmp_path / 'a')
    write_log(tmp_path / 'iterations', dict(loss=1.0, step=1, iter=1))
    write_log(tmp_path / 'empty', dict(step=1))
    write_log(tmp_path / 'damaged')
    (log,) = (tmp_path / 'damaged').glob('*/*/*')
    log.write_text('{"loss":')
    with pytest.raises(SystemExit, match=f'^error: .*{error}'):
        run_here(TOOL, *change(tmp_path))
