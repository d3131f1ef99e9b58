"""Checkpoints that are broken by chance or by intent, by every way they are read.

``MMOREPA_MUTATIONS=10000 pytest tests/converters/test_hostile_checkpoints.py`` for
many.
"""

import collections
import copy
import io
import os
import random
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from runners import BackboneClassifier, make_runner
from torch import nn

from mmorepa.backbones import OREPAResNet
from mmorepa.cli import one_line_errors
from mmorepa.converters import (
    deploy_checkpoint,
    load_strictly,
    read_checkpoint,
    write_checkpoint,
)
from mmorepa.runs.resume import read_resumable

MUTATIONS = int(os.environ.get('MMOREPA_MUTATIONS', 40))
# As few entries as show everything, since files are read by the thousand.
SMALL = dict(type='OREPAResNet', depth=18, base_channels=4, num_stages=1)
SMALL.update(out_indices=(0,), block_cfg=dict(branches=('origin', 'pointwise_kxk')))
NAN = float('nan')


class Code:
    """Pickles as a call of a function, which leaves a trace."""

    def __init__(self, function=None, *args):
        trace = os.path.join(os.environ['TRACE'], 'made')
        self.call = (function, args) if function else (os.mkdir, (trace,))

    def __reduce__(self):
        return self.call


@pytest.fixture(scope='module')
def runner(tmp_path_factory):
    """A runner that has trained and saved an epoch."""
    runner = make_runner(
        tmp_path_factory.mktemp('trained'),
        BackboneClassifier(SMALL),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        **dict.fromkeys(('val_dataloader', 'val_cfg', 'val_evaluator')),
    )
    runner.train()
    return runner


@pytest.fixture(scope='module')
def readers(runner, tmp_path_factory):
    """Every way to read a checkpoint: functions of a path that return what was read."""
    fresh, backbone = copy.deepcopy(runner.model), copy.deepcopy(runner.model.backbone)
    deployed = BackboneClassifier(dict(SMALL, deploy=True))
    out = str(tmp_path_factory.mktemp('out') / 'out.pth')
    runner.model.backbone.refuse_misfits()

    def folding(path):
        load_strictly(deployed, read_checkpoint(path)['state_dict'])
        return deployed.state_dict()

    def deploy(path):
        write_checkpoint(deploy_checkpoint(fresh, read_checkpoint(path)), out)
        return read_checkpoint(out)['state_dict']

    def init_cfg(path):
        backbone.init_cfg = dict(type='Pretrained', checkpoint=path)
        backbone._is_init = False
        backbone.init_weights()
        return backbone.state_dict()

    def load_from(path):
        runner.load_checkpoint(path)
        return runner.model.backbone.state_dict()

    def resume(path):
        load_strictly(runner.model, read_resumable(path)['state_dict'])
        runner.resume(path)
        return runner.model.state_dict()

    return [folding, deploy, init_cfg, load_from, resume]


def outcome(read, path):
    """'read', or the line that a tool ends with, which has to be one."""
    try:
        with one_line_errors():
            state = read(path)
    except SystemExit as exit:
        assert exit.code.startswith('error: ') and '\n' not in exit.code
        # That of an error which nobody has thought of. What the optimizer holds is the
        # optimizer's affair.
        assert 'MMOREPA_TRACEBACK' not in exit.code or read.__name__ == 'resume'
        return exit.code
    for key, value in state.items():
        assert value.isfinite().all() and ('running_var' not in key or value.min() >= 0)
    return 'read'


def damaged(data, rng):
    """The bytes of a file, cut, overwritten, moved, or others altogether."""
    start, length = rng.randrange(len(data)), rng.choice([1, 16, 512, 4096])
    return rng.choice(
        [
            data[:start],
            (data[:start] + bytes(length) + data[start + length :])[: len(data)],
            data[:start] + rng.randbytes(length) + data[start + length :],
            data[:start] + rng.randbytes(length) + data[start:],
            data[:start] + data[start + length :],
            rng.choice([b'', b'PK\x03\x04', b'\x80\x02', b'{}']) + rng.randbytes(200),
        ]
    )


def forged(data, rng):
    """A damaged pickle inside, whose checksum is right again."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(out, 'w') as other,
    ):
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith('data.pkl'):
                content = damaged(content, rng)
            other.writestr(entry.filename, content)
    return out.getvalue()


def value(state, rng):
    """Another value for an entry."""
    key = rng.choice([key for key in state if 'weight' in key])
    old = state[key]
    make = rng.choice(
        [
            lambda: old * NAN,
            lambda: old.to(rng.choice([torch.int64, torch.bool, torch.complex64])),
            lambda: rng.choice([old[:0], old[:1], old.flatten(), old[None], old.sum()]),
            lambda: old.to_sparse(),
            lambda: old.to('meta'),
            lambda: torch.quantize_per_tensor(old, 0.1, 0, torch.qint8),
            lambda: old[:1].clone().expand(1 << 30, *old.shape[1:]),
            lambda: nn.Parameter(old),
            lambda: rng.choice([None, 1, 'text', [1.0], {}, np.ones(3)]),
        ]
    )
    return {**state, key: make()}


def variance(state, rng):
    key = rng.choice([key for key in state if 'running_var' in key])
    return {**state, key: -state[key]}


def keys(state, rng):
    """Fewer, more, and other names."""
    few = rng.sample(list(state), len(state) - rng.choice([1, 3, len(state) // 2]))
    start = rng.choice(['module.', 'backbone.', 'model.', '.', ' '])
    return rng.choice(
        [
            {key: state[key] for key in few},
            {**state, f'{rng.choice(["backbone.", "neck."])}more': torch.ones(1)},
            {start + key: entry for key, entry in state.items()},
            {**state, rng.choice([0, None, b'weight', ('a', 1)]): torch.ones(1)},
        ]
    )


def other_network(state, rng):
    options = rng.choice([dict(depth=34), dict(base_channels=8), dict(block_cfg=None)])
    options = {**SMALL, **options}
    del options['type']
    other = OREPAResNet(**options).state_dict()
    return {f'backbone.{key}': entry for key, entry in other.items()}


def mixed_forms(state, rng):
    deployed = BackboneClassifier(dict(SMALL, deploy=True)).state_dict()
    convs = sorted({key.split('.branches')[0] for key in state if '.branches' in key})
    for conv in rng.sample(convs, rng.randint(1, len(convs))):
        if rng.random() < 0.5:
            state = {k: v for k, v in state.items() if not k.startswith(f'{conv}.')}
        state |= {k: v for k, v in deployed.items() if k.startswith(f'{conv}.')}
    return state


STATES = (value, value, variance, keys, other_network, mixed_forms)
CODE = (
    lambda: Code(),
    lambda: Code(eval, f'__import__("os").mkdir("{os.environ["TRACE"]}/made")'),
    lambda: Code(getattr, torch.Tensor, 'numpy'),
    lambda: nn.Linear(1, 1),
    lambda: np.array([Code()], dtype=object),
    lambda: collections.deque([1]),
)


def mutated(original, rng, path):
    """Writes a file; what was done to it."""
    kind = rng.choice(['file', 'file', 'forged', 'state', 'state', 'code', 'part'])
    checkpoint, done = dict(original), kind
    part = rng.choice(['meta', 'state_dict', 'message_hub', 'optimizer'])
    if kind == 'state':
        mutate = rng.choice(STATES)
        checkpoint['state_dict'] = mutate(dict(original['state_dict']), rng)
        done = mutate.__name__
    elif kind == 'code':
        checkpoint[part] = {**checkpoint[part], 'bad': rng.choice(CODE)()}
    elif kind == 'part':
        checkpoint[part] = rng.choice([None, 1, [], 'text', {}, torch.ones(1)])
    is_zip = kind == 'forged' or rng.random() < 0.75
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_zip)
    if kind in ('file', 'forged'):
        data = path.read_bytes()
        path.write_bytes((forged if kind == 'forged' else damaged)(data, rng))
    return done, kind == 'file' and is_zip


@pytest.mark.filterwarnings('ignore')
def test_nothing_is_run_and_everything_is_handled(
    runner, readers, tmp_path, monkeypatch
):
    trace, path = tmp_path / 'trace', tmp_path / 'mutated.pth'
    trace.mkdir()
    monkeypatch.setenv('TRACE', str(trace))
    original = read_checkpoint(os.path.join(runner.work_dir, 'epoch_1.pth'))
    counts, problems = Counter(), []
    for number in range(MUTATIONS):
        done, has_checksums = mutated(original, random.Random(number), path)
        texts = []
        for read in readers:
            try:
                texts.append(outcome(read, str(path)))
            except Exception as error:
                problems.append(f'{number}, {done}, {read.__name__}: {error!r:.500}')
        counts.update(text == 'read' for text in texts)
        if has_checksums and 'read' in texts:  # None was wrong, so no weight is.
            state = read_checkpoint(str(path))['state_dict']
            if not all(
                torch.equal(state[k], v) for k, v in original['state_dict'].items()
            ):
                problems.append(f'{number}, {done}: read, with other weights')
        if os.listdir(trace):
            problems.append(f'{number}, {done}: code was run')
    assert not problems, '\n'.join(problems)
    assert counts[False] > counts[True] > 0
