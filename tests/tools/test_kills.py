"""Kills at random moments, each followed by a resumed training.

Some more than this suite has time for::

    MMOREPA_KILLS=100 pytest tests/tools/test_kills.py
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from helpers import import_models
from tool_runs import ROOT

from mmorepa.converters import read_checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get('MMOREPA_KILLS', 2))
EPOCHS, ITERATIONS = 4, 3


@pytest.fixture(scope='module')
def tiny_config(config, tmp_path_factory):
    """With every source of randomness that a classifier has."""
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(f"""
_base_ = {str(config)!r}

model = dict(
    backbone=dict(base_channels=4),
    head=dict(in_channels=32, topk=(1,)),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)]),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32, interpolation='bicubic'),
    dict(type='RandomCrop', crop_size=32, padding=3),
    dict(type='RandomErasing', erase_prob=0.5, mode='rand'),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=8, dataset=dict(indices=list(range(0, 1440, 60)), pipeline=pipeline)
)
val_dataloader = dict(batch_size=8, dataset=dict(indices=list(range(0, 350, 40))))
train_cfg = dict(max_epochs={EPOCHS})
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='accuracy/top1'))
""")
    return path


@pytest.fixture(scope='module')
def start(tiny_config):
    """Starts a training in a new process, forked from one that has imported all."""
    import_models('mmpretrain')
    context = multiprocessing.get_context('forkserver')
    folder = str(ROOT / 'tests' / 'tools')
    before = os.environ.get('PYTHONPATH')
    # The server gets no sys.path; what is forked from it does.
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), folder, *sys.path])
    context.set_forkserver_preload(['killed_training'])
    from killed_training import train

    def start_one(work_dir, **options):
        work_dir.mkdir(exist_ok=True)
        (work_dir / 'output').touch()
        process = context.Process(
            target=train, args=(tiny_config, work_dir), kwargs=options
        )
        process.start()
        return process

    first = context.Process(target=int)  # The imports, which nobody should wait for.
    first.start()
    first.join()
    yield start_one
    if before is None:
        del os.environ['PYTHONPATH']
    else:
        os.environ['PYTHONPATH'] = before


def losses(work_dir):
    """By run: what was logged, as (iteration, loss)."""
    runs = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        lines = path.read_text().splitlines()
        # A kill may cut the last line.
        lines = [json.loads(line) for line in lines if line.endswith('}')]
        runs.append([(line['iter'], line['loss']) for line in lines if 'loss' in line])
    return runs


def newest(work_dir):
    """The epoch of the newest checkpoint."""
    return max((int(p.stem[6:]) for p in work_dir.glob('epoch_*.pth')), default=0)


def assert_whole(work_dir):
    for path in work_dir.glob('[a-z]*.pth'):
        read_checkpoint(str(path))


def test_kills(start, tmp_path):
    """No kill changes a loss, loses a checkpoint, or costs more than an epoch."""
    whole = tmp_path / 'whole'
    began = time.monotonic()
    process = start(whole)
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0, (whole / 'output').read_text()[-3000:]
    ((*expected,),) = losses(whole)
    assert [i for i, _ in expected] == list(range(1, EPOCHS * ITERATIONS + 1))
    assert len({loss for _, loss in expected}) == len(expected)
    weights = read_checkpoint(str(whole / f'epoch_{EPOCHS}.pth'))['state_dict']

    draw = random.Random(os.environ.get('MMOREPA_SEED', '0'))
    kills = saving = trainings = left = 0
    while kills < KILLS:
        work_dir = tmp_path / f'killed_{trainings}'
        trainings += 1
        while True:
            before = newest(work_dir)
            if kills < KILLS and draw.random() < 0.5:
                # Three operations an epoch, and six more for a better one.
                fatal = draw.randint(1, 4 * (EPOCHS - before) + 2)
                process = start(work_dir, fatal=fatal, seed=draw.random())
                process.join()
            else:
                process = start(work_dir)
                process.join(draw.uniform(0.1, 1) * seconds if kills < KILLS else None)
                fatal = None
                process.kill()
                process.join()
            if process.exitcode == 0:
                break
            text = (work_dir / 'output').read_text()[-3000:]
            assert process.exitcode == -signal.SIGKILL, text
            kills += 1
            saving += fatal is not None
            assert newest(work_dir) >= before
            assert_whole(work_dir)
            time.sleep(1)  # Folders of logs are named by the second.
        runs = losses(work_dir)
        found = {i: loss for run in runs for i, loss in run}
        assert sorted(found) == [i for i, _ in expected]
        for run in filter(None, runs):
            first = run[0][0]
            assert first % ITERATIONS == 1
            assert run == expected[first - 1 :][: len(run)]
        state = read_checkpoint(str(work_dir / f'epoch_{EPOCHS}.pth'))['state_dict']
        assert all((state[key] == value).all() for key, value in weights.items())
        # A kill just before a removal leaves what was to be removed.
        names = {p.name for p in work_dir.glob('*.pth')}
        assert {p.name for p in whole.glob('*.pth')} <= names
        left += len(names) - 2
        print(f'{kills} kills in {trainings} trainings', flush=True)
    print(
        f'{kills} kills, {saving} of them while saving, in {trainings} trainings: '
        f'no difference, {left} files too many'
    )
