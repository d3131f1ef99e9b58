"""Checkpoints that are broken by chance or by intent, by every way they are read.

``MMOREPA_MUTATIONS=10000 pytest tests/converters/test_hostile_checkpoints.py`` for
many.
"""

import collections
import copy
import fractions
import importlib.util
import io
import os
import random
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from published_layout import resnet, trained_state
from runners import CLASSES, make_runner
from torch import nn
from torch.nn import functional as F

from mmorepa.backbones import OREPAResNet
from mmorepa.cli import one_line_errors
from mmorepa.converters import (
    deploy_checkpoint,
    from_published,
    load_strictly,
    read_checkpoint,
    write_checkpoint,
)
from mmorepa.runs.resume import read_resumable

MUTATIONS = int(os.environ.get('MMOREPA_MUTATIONS', 60))
# As few entries as show everything, since files are read by the thousand.
SMALL = dict(depth=18, base_channels=4, num_stages=1, out_indices=(0,))
SMALL['block_cfg'] = dict(branches=('origin', 'pointwise_kxk'))
HAS_SAFETENSORS = importlib.util.find_spec('safetensors') is not None
ran = []


def run_code(*args):
    """What a checkpoint calls if it can."""
    ran.append(args)


class Code:
    """Pickles as a call of a function."""

    def __init__(self, function=run_code, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Network(BaseModel):
    """A classifier with a backbone of ours."""

    def __init__(self, deploy=False):
        super().__init__()
        self.backbone = OREPAResNet(**SMALL, deploy=deploy)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs, labels=None, mode='tensor'):
        logits = self.head(self.backbone(inputs)[0].mean(dim=(2, 3)))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(logits, labels))
        return logits


@pytest.fixture(scope='module')
def runner(tmp_path_factory):
    """A runner that has trained and saved an epoch."""
    runner = make_runner(
        tmp_path_factory.mktemp('trained'),
        Network(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
    )
    runner.train()
    return runner


@pytest.fixture(scope='module')
def ways(runner, tmp_path_factory):
    """Every way to read a checkpoint: functions of a path."""
    model, fresh = copy.deepcopy(runner.model), copy.deepcopy(runner.model)
    deployed, backbone = Network(deploy=True), copy.deepcopy(runner.model.backbone)
    out = str(tmp_path_factory.mktemp('out') / 'out.pth')

    def deploy(path):
        write_checkpoint(deploy_checkpoint(fresh, read_checkpoint(path)), out)
        assert not flaws(read_checkpoint(out)['state_dict'])

    def init_cfg(path):
        backbone.init_cfg = dict(type='Pretrained', checkpoint=path)
        backbone._is_init = False
        backbone.init_weights()
        return backbone

    def load_from(path):
        runner.model.backbone.refuse_misfits()
        runner.load_checkpoint(path)
        return runner.model.backbone

    def resume(path):
        load_strictly(runner.model, read_resumable(path)['state_dict'])
        runner.resume(path)
        return runner.model

    def load(model):
        def load_into(path):
            load_strictly(model, read_checkpoint(path)['state_dict'])
            return model

        return load_into

    def published(path):
        translated = from_published(read_checkpoint(path, True)['state_dict'])
        assert not flaws(translated['state_dict'])

    return dict(
        strict=load(model),
        folding=load(deployed),
        deploy=deploy,
        init_cfg=init_cfg,
        load_from=load_from,
        resume=resume,
        published=published,
    )


def flaws(state):
    return [
        key
        for key, value in state.items()
        if not value.isfinite().all() or 'running_var' in key and value.min() < 0
    ]


def outcome(way, path):
    """'read', or the line that a tool ends with, which has to be one."""
    try:
        with one_line_errors():
            model = way(path)
    except SystemExit as exit:
        text = exit.code
        assert text.startswith('error: ') and '\n' not in text, text
        # That of an error which nobody has thought of. What the optimizer holds is the
        # optimizer's affair.
        assert 'MMOREPA_TRACEBACK' not in text or way.__name__ == 'resume', text
        return text
    if isinstance(model, nn.Module):
        assert not flaws(model.state_dict())
    return 'read'


# Of the bytes of a file.


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def zeros(data, rng):
    start, length = rng.randrange(len(data)), rng.choice([1, 16, 512, 4096, 65536])
    return (data[:start] + bytes(length) + data[start + length :])[: len(data)]


def flips(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 64])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def insertion(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice([1, 7, 512])) + data[start:]


def removal(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 7, 512, 4096]) :]


def noise(data, rng):
    return rng.choice([b'', b'PK\x03\x04', b'\x80\x02', b'{}']) + rng.randbytes(200)


FILE_MUTATIONS = (cut, zeros, flips, insertion, removal, noise)


def forged(data, rng):
    """A mutation of the pickle inside, whose checksum is right again."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(out, 'w') as other,
    ):
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith('data.pkl'):
                content = rng.choice(FILE_MUTATIONS[:5])(content, rng)
            other.writestr(entry.filename, content)
    return out.getvalue()


# Of what a file holds. Each changes the state dict in place, or returns another one.


def some(state, rng, words='weight'):
    return rng.choice([key for key in state if isinstance(key, str) and words in key])


def values(state, rng):
    key, bad = some(state, rng, ''), rng.choice([float('nan'), float('inf')])
    if state[key].is_floating_point():
        state[key].flatten()[rng.randrange(state[key].numel())] = bad


def variances(state, rng):
    state[some(state, rng, 'running_var')].neg_()


def keys(state, rng):
    bad = rng.choice([0, 1.5, None, b'weight', ('a', 1), True])
    state[bad] = state.pop(some(state, rng))


def types(state, rng):
    key, dtypes = some(state, rng), (torch.int64, torch.uint8, torch.bool)
    dtype = rng.choice([*dtypes, torch.complex64, torch.float8_e4m3fn])
    state[key] = state[key].to(dtype)


def halves(state, rng):
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float64])
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def shapes(state, rng):
    key = some(state, rng)
    value = state[key]
    state[key] = rng.choice(
        [
            value[:0],
            value[:1],
            value.flatten(),
            value[None],
            value.sum(),
            torch.cat([value, value]),
            value.mT if value.dim() > 1 else value,
        ]
    )


def layouts(state, rng):
    key = some(state, rng)
    value = state[key]
    state[key] = rng.choice(
        [
            lambda: value.to_sparse(),
            lambda: value.to('meta'),
            lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            lambda: value[:1].clone().expand(1 << 30, *value.shape[1:]),
            lambda: nn.Parameter(value),
            lambda: torch.stack([value, value], -1)[..., 0],
            lambda: value.flatten()[:1].expand(value.numel()).view(value.shape),
        ]
    )()


def fewer(state, rng):
    for key in rng.sample(list(state), rng.choice([1, 3, len(state) // 2, len(state)])):
        del state[key]


def more(state, rng):
    for i in range(rng.choice([1, 10, 1000])):
        state[f'{rng.choice(["backbone.", "head.", "", "neck."])}extra{i}.weight'] = (
            torch.ones(1)
        )


def names(state, rng):
    start = rng.choice(['module.', 'backbone.', 'model.', 'module.module.', '.', ' '])
    return {start + key: value for key, value in state.items()}


def other_network(state, rng):
    options = rng.choice(
        [dict(depth=34), dict(depth=50), dict(base_channels=8), dict(block_cfg=None)]
    )
    other = OREPAResNet(**{**SMALL, **options})
    return {f'backbone.{key}': value for key, value in other.state_dict().items()}


def mixed_forms(state, rng):
    deployed = Network(deploy=True).state_dict()
    convs = sorted({key.split('.branches')[0] for key in state if '.branches' in key})
    convs = convs or sorted({key.rpartition('.')[0] for key in state})
    for conv in rng.sample(convs, rng.randint(1, len(convs))):
        if rng.random() < 0.5:
            for key in [k for k in state if k.startswith(f'{conv}.')]:
                del state[key]
        state.update({k: v for k, v in deployed.items() if k.startswith(f'{conv}.')})


def no_tensors(state, rng):
    state[some(state, rng)] = rng.choice([None, 1, 'text', [1.0], {}, np.ones(3)])


def containers(state, rng):
    return rng.choice([[], None, 3, [*state.values()], dict(a=state), torch.ones(2)])


STATE_MUTATIONS = (values, variances, keys, types, halves, shapes, layouts, fewer, more)
STATE_MUTATIONS += (names, other_network, mixed_forms, no_tensors, containers)

CODE = (
    lambda: Code(),
    lambda: Code(os.mkdir, os.path.join(os.environ['TRACE'], 'made')),
    lambda: Code(os.system, f'touch {os.environ["TRACE"]}/touched'),
    lambda: Code(eval, 'run_code()'),
    lambda: Code(Code(getattr, run_code, '__call__').call[0], run_code, '__globals__'),
    lambda: fractions.Fraction(1, 2),
    lambda: nn.Linear(1, 1),
    lambda: np.array([Code()], dtype=object),
    lambda: collections.deque([1]),
)


def code(checkpoint, rng):
    """Something to be run, or of a class that nobody has allowed, anywhere."""
    bad = rng.choice(CODE)()
    place = rng.choice(['meta', 'state_dict', 'message_hub', 'optimizer', 'new', ''])
    if not place:
        return bad
    if isinstance(checkpoint.get(place), dict) and rng.random() < 0.7:
        checkpoint[place] = {**checkpoint[place], 'bad': bad}
    else:
        checkpoint[place] = bad
    return checkpoint


def parts(checkpoint, rng):
    """Another kind of thing where a part of the training's state is."""
    key = rng.choice(['meta', 'message_hub', 'optimizer', 'state_dict'])
    if rng.random() < 0.5:
        checkpoint.pop(key, None)
    else:
        checkpoint[key] = rng.choice([None, 1, [], 'text', {}, torch.ones(1)])
    return checkpoint


def mutated(original, rng, path):
    """Writes a file. Its name, what was done to it, and whether checksums tell."""
    kind = rng.choice(['file', 'file', 'forged', 'state', 'state', 'code', 'parts'])
    checkpoint = copy.deepcopy(original)
    if kind == 'state':
        mutate = rng.choice(STATE_MUTATIONS)
        # Several times, one over the other.
        changed = mutate(checkpoint['state_dict'], rng)
        if changed is not None:
            checkpoint['state_dict'] = changed
        if rng.random() < 0.3:
            checkpoint = checkpoint['state_dict']
    elif kind in ('code', 'parts'):
        mutate = dict(code=code, parts=parts)[kind]
        checkpoint = mutate(checkpoint, rng)
    else:
        mutate = forged if kind == 'forged' else rng.choice(FILE_MUTATIONS)
    form = 'zip' if kind == 'forged' else rng.choice(['zip', 'zip', 'zip', 'old'])
    if kind == 'file' and HAS_SAFETENSORS and rng.random() < 0.1:
        form = 'safetensors'
    path = f'{path}.safetensors' if form == 'safetensors' else f'{path}.pth'
    if form == 'safetensors':
        write_checkpoint(checkpoint, path)
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=form == 'zip')
    if kind in ('file', 'forged'):
        with open(path, 'rb') as file:
            data = mutate(file.read(), rng)
        with open(path, 'wb') as file:
            file.write(data)
    return path, f'{mutate.__name__}, {form}', kind == 'file' and form == 'zip'


@pytest.mark.filterwarnings('ignore')
def test_nothing_is_run_and_everything_is_handled(
    runner, ways, tmp_path, monkeypatch, capsys
):
    trace = tmp_path / 'trace'
    trace.mkdir()
    monkeypatch.setenv('TRACE', str(trace))
    original = read_checkpoint(os.path.join(runner.work_dir, 'epoch_1.pth'))
    published = dict(
        state_dict=trained_state(resnet((2, 2, 2, 2), False, 4, 1, 64, 'orepa'))
    )
    found, problems = Counter(), []
    for number in range(MUTATIONS):
        rng = random.Random(number)
        is_published = number % 20 == 19
        source = published if is_published else original
        path, done, has_checksums = mutated(source, rng, tmp_path / 'mutated')
        names = ['published'] if is_published else [w for w in ways if w != 'published']
        texts = {}
        for name in names:
            try:
                texts[name] = outcome(ways[name], path)
            except Exception as error:
                problems.append(f'{number}, {done}, {name}: {error!r:.500}')
        found.update('read' if t == 'read' else 'refused' for t in texts.values())
        if has_checksums and 'read' in texts.values():
            # None was wrong, and so no weight is.
            state = read_checkpoint(path, True)['state_dict']
            expected = source['state_dict']
            if state.keys() != expected.keys() or not all(
                torch.equal(state[key], value) for key, value in expected.items()
            ):
                problems.append(f'{number}, {done}: read, with other weights')
        if ran or os.listdir(trace):
            problems.append(f'{number}, {done}: code was run')
    with capsys.disabled():
        print(f'\n{MUTATIONS} checkpoints, {len(problems)} problems: {dict(found)}')
    assert not problems, '\n'.join(problems)
    assert found['refused'] > found['read'] > 0
