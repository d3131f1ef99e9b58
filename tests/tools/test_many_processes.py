"""Runs that torchrun and Slurm start: who writes, who dies, what comes out."""

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
from helpers import assert_near_states
from mmengine.config import Config
from mmengine.runner import Runner
from tool_runs import ROOT, environment, free_port, run_apart

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
randomness = dict(seed=0)
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(CONFIG)
    return path


def launch(script, *args, **variables):
    """Runs one of the shell scripts."""
    places = [ROOT, *(ROOT / 'tests' / name for name in ('', 'tools'))]
    variables['PYTHONPATH'] = os.pathsep.join(map(str, places))
    line = ['bash', ROOT / 'tools' / script, *args]
    return run_apart(*line, PORT=free_port(), timeout=SECONDS, **variables)


def succeeded(*args, **kwargs):
    done = launch(*args, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


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
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(
        {
            'model_wrapper_cfg': None,
            'train_dataloader.batch_size': 16,
            'work_dir': str(folder),
            'experiment_name': 'single',
        }
    )
    Runner.from_cfg(cfg).train()
    return weights(folder / 'epoch_2.pth')


def test_equals_one_process_and_rank_0_writes(config, single, tmp_path):
    """Training, validation, checkpoints and a test of the deployed form."""
    notes, work = tmp_path / 'notes', tmp_path / 'work'
    notes.mkdir()
    args = [2, '--work-dir', work]
    succeeded('dist_train.sh', config, *args, MMOREPA_WRITES=str(notes))
    assert_near_states(weights(work / 'epoch_2.pth'), single, 1e-4)
    args += ['--deploy', '--out', work / 'metrics.json', '--out-item', 'metrics']
    args = [config, work / 'epoch_2.pth', *args]
    succeeded('dist_test.sh', *args, MMOREPA_WRITES=str(notes))
    assert 'accuracy' in json.loads((work / 'metrics.json').read_text())
    first, second = ((notes / f'rank{rank}').read_text() for rank in range(2))
    assert 'metrics.json' in first
    paths = [Path(line) for line in second.splitlines() if str(tmp_path) in line]
    # Where MMEngine's LoggerHook has every process write the metrics of a test.
    assert all(path.stem == path.parent.name for path in paths)


def test_a_dead_process_ends_the_run(config, tmp_path):
    """With an error, at once, and without anybody left behind."""
    hurt = tmp_path / 'hurt.py'
    hook = dict(type='Accident', rank=1, at='after_train_iter')
    hurt.write_text(f'_base_ = {str(config)!r}\ncustom_hooks = [{hook}]\n')
    done = launch('dist_train.sh', hurt, 2, '--work-dir', tmp_path / 'work')
    assert done.returncode != 0
    assert 'FAILED' in done.stderr
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
    args = ['partition', 'job', config, tmp_path / 'work']
    path = f'{tmp_path}:{environment()["PATH"]}'
    port = dict(MASTER_PORT=free_port())
    succeeded('slurm_train.sh', *args, GPUS='2', PATH=path, **port)
    assert_near_states(weights(tmp_path / 'work/epoch_2.pth'), single, 1e-4)
