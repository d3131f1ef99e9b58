"""Runs that torchrun and Slurm start: who writes, who dies, what comes out."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest
from helpers import assert_near
from tool_runs import ROOT, environment, run_apart

from mmorepa.converters import read_checkpoint

pytestmark = pytest.mark.slow

SECONDS = 300  # More than any of these runs takes, on a busy machine too.
CONFIG = """
custom_imports = dict(imports=['mmorepa', 'runners', 'accidents'])
model = dict(type='TinyClassifier', norm_eval=True)
loader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(type='Colours', size=32),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
)
train_dataloader = val_dataloader = test_dataloader = loader
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = test_cfg = dict()
val_evaluator = test_evaluator = dict(type='Logits')
optim_wrapper = dict(
    constructor='OREPAOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4),
)
model_wrapper_cfg = dict(type='FoldedDistributedDataParallel')
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
custom_hooks = [dict(type='SwitchToDeployHook', save_after_train=True)]
randomness = dict(seed=0)
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(CONFIG)
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def launch(script, *args, options=(), **variables):
    """Runs one of the shell scripts."""
    places = [ROOT, *(ROOT / 'tests' / name for name in ('', 'tools'))]
    options = ['--cfg-options', *options] if options else []
    return run_apart(
        'bash',
        ROOT / 'tools' / script,
        *args,
        *options,
        PORT=free_port(),
        PYTHONPATH=os.pathsep.join(map(str, places)),
        timeout=SECONDS,
        **variables,
    )


def succeeded(*args, **kwargs):
    done = launch(*args, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


def weights(path):
    return read_checkpoint(str(path))['state_dict']


def processes_of(folder):
    """Those that name a folder in their command line."""
    found = []
    for process in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):  # It has ended.
            found += [process] if str(folder).encode() in process.read_bytes() else []
    return found


@pytest.fixture(scope='module')
def single(config, tmp_path_factory):
    """The weights after training in one process, with the whole batch."""
    folder = tmp_path_factory.mktemp('single')
    options = ['model_wrapper_cfg=None', 'train_dataloader.batch_size=16']
    succeeded('dist_train.sh', config, 1, '--work-dir', folder, options=options)
    return weights(folder / 'epoch_2.pth')


def assert_near_all(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.is_floating_point() and value.any():
            assert_near(found[key], value, tolerance)


@pytest.mark.parametrize('world', [2, 4])
def test_equals_one_process_and_rank_0_writes(config, single, tmp_path, world):
    """Training, validation, checkpoints, deployment and a test, by torchrun."""
    notes = tmp_path / 'notes'
    notes.mkdir()
    work = tmp_path / 'work'
    writes = dict(MMOREPA_WRITES=str(notes))
    options = [f'train_dataloader.batch_size={16 // world}']
    args = [world, '--work-dir', work]
    succeeded('dist_train.sh', config, *args, options=options, **writes)
    assert_near_all(weights(work / 'epoch_2.pth'), single, 1e-4)
    assert (work / 'epoch_2_deploy.pth').is_file()
    if world == 2:  # More processes test as two do.
        args += ['--deploy', '--out', work / 'metrics.json', '--out-item', 'metrics']
        succeeded('dist_test.sh', config, work / 'epoch_2.pth', *args, **writes)
        assert 'accuracy' in json.loads((work / 'metrics.json').read_text())
        assert 'metrics.json' in (notes / 'rank0').read_text()
    for rank in range(1, world):
        written = (notes / f'rank{rank}').read_text().splitlines()
        written = [Path(path) for path in written if path.startswith(str(tmp_path))]
        # Where MMEngine's LoggerHook has every process write the metrics of a test.
        assert all(path.stem == path.parent.name for path in written)
    assert 'epoch_2_deploy.pth' in (notes / 'rank0').read_text()


@pytest.mark.parametrize(
    ('rank', 'at', 'how'),
    [
        (1, 'before_train', 'kill'),
        (1, 'after_train_iter', 'kill'),
        (1, 'after_train_iter', 'raise'),
        (1, 'after_train_iter', 'leave'),
        (0, 'after_val_iter', 'kill'),
        (0, 'before_save_checkpoint', 'kill'),
    ],
)
def test_a_dead_process_ends_the_run(config, tmp_path, rank, at, how):
    """With an error, at once, and without anybody left behind."""
    hurt = tmp_path / 'hurt.py'
    hook = dict(type='Accident', rank=rank, at=at, how=how)
    hurt.write_text(f'_base_ = {str(config)!r}\ncustom_hooks = [{hook}]\n')
    done = launch('dist_train.sh', hurt, 2, '--work-dir', tmp_path / 'work')
    assert done.returncode != 0
    assert 'FAILED' in done.stderr
    if how == 'raise':
        assert 'RuntimeError: an accident' in done.stderr
    deadline = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(tmp_path)


SRUN = """#!/bin/bash
for word; do case $word in --ntasks=*) export SLURM_NTASKS=${word#*=} ;; esac; done
while [[ $1 != python ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_JOB_NODELIST=node "$@" &
done
for job in $(jobs -p); do wait "$job" || exit 1; done
"""


def test_slurm(config, single, tmp_path):
    """As torchrun does it, by what Slurm sets."""
    for name, script in dict(srun=SRUN, scontrol='#!/bin/sh\necho 127.0.0.1').items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    done = launch(
        'slurm_train.sh',
        'partition',
        'job',
        config,
        tmp_path / 'work',
        GPUS='2',
        PATH=f'{tmp_path}:{environment()["PATH"]}',
        MASTER_PORT=free_port(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_near_all(weights(tmp_path / 'work' / 'epoch_2.pth'), single, 1e-4)
