"""A killed training, resumed, goes on as if nothing had happened."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DATA_SAMPLERS
from runners import Colours, Logits, Probe, TinyClassifier, colours_loader, make_runner
from torch.nn import functional as F

from mmorepa.converters import read_checkpoint
from mmorepa.engine.seeding import SeededBatches
from mmorepa.utils.errors import OutputError

HOOK = dict(type='CrashSafeHook')
CHECKPOINTS = dict(type='CheckpointHook', interval=1)


@pytest.fixture(autouse=True)
def backend():
    """The hook has MMEngine write files in another way, in this process."""
    yield
    register_backend('local', LocalBackend, force=True, prefixes='')


class Augmented(Colours):
    """Draws from every generator for every item; keeps which items it gave."""

    def __init__(self, size):
        super().__init__(size)
        self.given = []

    def __getitem__(self, i):
        self.given.append(i)
        image, label = super().__getitem__(i)
        noise = torch.randn(image.shape) + np.random.randn() + random.gauss(0, 1)
        return image + 0.3 * noise, label


class RandomClassifier(TinyClassifier):
    """Draws while it trains; keeps its losses."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def forward(self, inputs, labels=None, mode='tensor'):
        if mode == 'loss':
            inputs = F.dropout(inputs, 0.2) * random.uniform(0.5, 2) + np.random.rand()
        outputs = super().forward(inputs, labels, mode)
        if mode == 'loss':
            self.losses.append(outputs['loss'].item())
        return outputs


class RandomSampler(torch.utils.data.RandomSampler):
    """PyTorch's, with the numbers of the process."""

    def __init__(self, dataset, seed):
        super().__init__(dataset)


def trained(folder, sampler='DefaultSampler', workers=0, by_epoch=True, **options):
    """The losses of a training of 3 epochs of 4 batches, or of 12 iterations."""
    loader = colours_loader(
        batch_size=6,
        num_workers=workers,
        persistent_workers=options.pop('persistent', workers > 0),
        dataset=Augmented(24),
        sampler=dict(type=sampler),
        batch_sampler=options.pop('batch_sampler', None),
    )
    if not by_epoch:
        options['train_cfg'] = dict(by_epoch=False, max_iters=12, val_interval=5)
    options.setdefault('train_cfg', dict(by_epoch=True, max_epochs=3))
    torch.manual_seed(0)
    saving = dict(
        CHECKPOINTS, by_epoch=by_epoch, max_keep_ckpts=options.pop('keep', -1)
    )
    runner = make_runner(
        folder,
        RandomClassifier(),
        train_dataloader=loader,
        default_hooks=dict(checkpoint=saving),
        **{'custom_hooks': [HOOK], **options},
    )
    runner.train()
    return runner


def losses(*args, **options):
    return trained(*args, **options).model.losses


@pytest.fixture(autouse=True, scope='module')
def samplers():
    DATA_SAMPLERS.register_module(name='GlobalSampler', module=RandomSampler)
    yield
    DATA_SAMPLERS.module_dict.pop('GlobalSampler')


@pytest.mark.slow
class TestLosses:
    @pytest.fixture(scope='class')
    def whole(self, tmp_path_factory):
        """The folder and the losses of trainings that nothing interrupts."""
        results = {}

        def train(**options):
            key = repr(options)
            if key not in results:
                folder = tmp_path_factory.mktemp('whole')
                results[key] = folder, losses(folder, **options)
            return results[key]

        return train

    @pytest.mark.parametrize(('workers', 'persistent'), [(0, False), (2, True)])
    def test_epochs(self, whole, tmp_path, workers, persistent):
        folder, expected = whole()
        assert len(set(expected)) == 12
        path = str(folder / 'epoch_1.pth')
        options = dict(workers=workers, persistent=persistent)
        assert losses(tmp_path, load_from=path, resume=True, **options) == expected[4:]

    @pytest.mark.parametrize(
        ('sampler', 'workers', 'done'),
        [
            ('InfiniteSampler', 0, 3),
            ('InfiniteSampler', 2, 4),
            ('DefaultSampler', 0, 7),
        ],
    )
    def test_iterations(self, whole, tmp_path, sampler, workers, done, monkeypatch):
        """From the middle of an epoch, and from the first batch of the second."""
        monkeypatch.setattr('time.sleep', lambda seconds: None)  # MMEngine's, of 2 s.
        options = dict(sampler=sampler, by_epoch=False)
        folder, expected = whole(**options)
        assert len(set(expected)) == 12
        options.update(workers=workers, load_from=str(folder / f'iter_{done}.pth'))
        rest = trained(tmp_path, resume=True, **options)
        assert rest.model.losses == expected[done:]
        if sampler == 'InfiniteSampler' and not workers:
            # MMEngine loads whatever was seen before, to pass over it.
            assert len(rest.train_dataloader.dataset.given) == (12 - done) * 6

    def test_sampler_without_a_seed(self, whole, tmp_path):
        folder, expected = whole(sampler='GlobalSampler')
        path = str(folder / 'epoch_2.pth')
        options = dict(sampler='GlobalSampler', load_from=path, resume=True)
        assert losses(tmp_path, **options) == expected[8:]

    def test_seeds_differ(self, whole, tmp_path):
        _, first = whole()
        assert not set(losses(tmp_path, randomness=dict(seed=1))) & set(first)

    def test_what_cannot_be_set_back(self, tmp_path):
        """An iteration-based loop has begun with a sampler that nobody knows."""

        class OwnBatches(torch.utils.data.BatchSampler):
            pass

        texts = []
        trained(
            tmp_path,
            by_epoch=False,
            batch_sampler=dict(type=OwnBatches, drop_last=True),
            custom_hooks=[
                HOOK,
                Probe(before_run=lambda r: setattr(r.logger, 'warning', texts.append)),
            ],
        )
        assert len([text for text in texts if 'cannot be set back' in text]) == 1


class TestSeeding:
    @pytest.mark.parametrize(
        ('sampler', 'by_epoch'), [('DefaultSampler', True), ('InfiniteSampler', False)]
    )
    def test_a_second_training(self, tmp_path, sampler, by_epoch):
        runner = trained(tmp_path, sampler=sampler, by_epoch=by_epoch)
        runner.train()
        batches = runner.train_dataloader.batch_sampler
        assert type(batches) is SeededBatches
        assert type(batches.batches) is torch.utils.data.BatchSampler

    def test_batches(self):
        batches = SeededBatches(torch.utils.data.BatchSampler(range(6), 2, False), 1)
        assert len(batches) == 3 and batches.batch_size == 2
        first = [(list(batch), len(batch), batch.seed) for batch in batches]
        assert [indices for indices, *_ in first] == [[0, 1], [2, 3], [4, 5]]
        more = [batch.seed for batch in batches]
        assert len({*more, *(seed for *_, seed in first)}) == 6
        noise = []
        for batch in [*batches, *SeededBatches(batches.batches, 2)]:
            list(batch)
            noise += [random.random(), np.random.rand(), torch.rand(()).item()]
        assert len({*noise}) == 18
        batches.number, batches.first = 0, 4
        assert [list(batch) for batch in batches] == []
        assert [batch.seed for batch in batches] == more[1:]


class TestFiles:
    def watch(self, monkeypatch):
        """What is written, and which checkpoints are whole at that moment."""
        states = []
        write = Path.write_bytes

        def write_bytes(path, data):
            whole = sorted(p.name for p in path.parent.glob('[a-z]*.pth'))
            states.append((path.name.split('.', 2)[2], whole))
            return write(path, data)

        monkeypatch.setattr(Path, 'write_bytes', write_bytes)
        return states

    @pytest.mark.parametrize('by_epoch', [True, False])
    def test_removes_after_saving(self, tmp_path, monkeypatch, by_epoch):
        states = self.watch(monkeypatch)
        trained(tmp_path, by_epoch=by_epoch, keep=1)
        name, last = ('epoch', 3) if by_epoch else ('iter', 12)
        assert states == [
            (f'{name}_{n}.pth', [f'{name}_{n - 1}.pth'] if n > 1 else [])
            for n in range(1, last + 1)
        ]
        assert [p.name for p in tmp_path.glob('*.pth')] == [f'{name}_{last}.pth']

    def test_best(self, tmp_path, monkeypatch):
        """The better one is there before the best of up to now goes."""
        states = self.watch(monkeypatch)
        scores = iter([0.1, 0.3, 0.2])
        monkeypatch.setattr(
            Logits, 'compute_metrics', lambda *_: dict(accuracy=next(scores))
        )
        hooks = dict(
            checkpoint=dict(
                type='CheckpointHook', save_best='accuracy', max_keep_ckpts=1
            )
        )
        runner = make_runner(
            tmp_path,
            default_hooks=hooks,
            train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=1),
            custom_hooks=[HOOK],
        )
        runner.train()
        best = [whole for name, whole in states if name.startswith('best_')]
        assert ['best_accuracy_epoch_1.pth' in whole for whole in best] == [False, True]
        names = {p.name for p in tmp_path.glob('*.pth')}
        assert 'best_accuracy_epoch_2.pth' in names
        assert 'best_accuracy_epoch_1.pth' not in names

    def test_leftovers(self, tmp_path):
        """Of a kill while saving; another training may be writing its own file."""
        killed = subprocess.Popen([sys.executable, '-c', ''])
        killed.wait()
        gone = [tmp_path / f'.{pid}.epoch_2.pth' for pid in (killed.pid, os.getpid())]
        kept = [
            tmp_path / name
            for name in (f'.{os.getppid()}.epoch_2.pth', '.notes.pth', '.1-a.b.pth')
        ]
        for path in (*gone, *kept):
            path.touch()
        trained(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=1))
        assert all(path.exists() for path in kept)
        assert not any(path.exists() for path in gone)

    @pytest.mark.slow
    @pytest.mark.parametrize('by_epoch', [True, False])
    def test_killed_before_validation(self, tmp_path, monkeypatch, by_epoch):
        """What was the best, and when a learning rate falls, depends on it."""
        scores = dict(zip((3, 6, 9, 12), (0.3, 0.2, 0.4, 0.1)))
        seen = []

        class Cut(Exception):
            pass

        def cut(runner):
            if runner.iter == 9 and not runner._resume:
                raise Cut

        def options(**more):
            hooks = [HOOK, Probe(before_val_iter=cut)]
            keep = dict(type='CheckpointHook', interval=1, save_best='accuracy')
            cfg = dict(by_epoch=by_epoch, val_interval=1 if by_epoch else 3)
            cfg['max_epochs' if by_epoch else 'max_iters'] = 4 if by_epoch else 12
            return dict(
                default_hooks=dict(checkpoint=dict(keep, by_epoch=by_epoch)),
                train_cfg=cfg,
                custom_hooks=hooks,
                **more,
            )

        def compute_metrics(self, results):
            seen.append(runner.iter)
            return dict(accuracy=scores[runner.iter])

        monkeypatch.setattr(Logits, 'compute_metrics', compute_metrics)
        runner = make_runner(tmp_path, **options())
        with pytest.raises(Cut):
            runner.train()
        last = (tmp_path / 'last_checkpoint').read_text()
        runner = make_runner(tmp_path, **options(resume=True, load_from=last))
        runner.train()
        assert seen == [3, 6, 9, 12]
        (best,) = tmp_path.glob('best_*')
        assert best.stem == f'best_accuracy_{"epoch_3" if by_epoch else "iter_9"}'
        # The best one was saved when its validation was done, which need not be again.
        seen.clear()
        step = 1 if by_epoch else 3
        path = str(tmp_path / f'{"epoch" if by_epoch else "iter"}_{step}.pth')
        runner = make_runner(tmp_path, **options(resume=True, load_from=path))
        runner.train()
        assert seen == [6, 9, 12]

    def test_error_while_saving(self, tmp_path, monkeypatch):
        """As when the disk is full."""
        write = Path.write_bytes

        def write_bytes(path, data):
            if 'epoch_2' in path.name:
                write(path, data[: len(data) // 2])
                raise OSError(28, 'No space left on device')
            return write(path, data)

        monkeypatch.setattr(Path, 'write_bytes', write_bytes)
        with pytest.raises(OutputError, match='epoch_2.*No space left'):
            trained(tmp_path, keep=1)
        assert [p.name for p in tmp_path.glob('*epoch*')] == ['epoch_1.pth']
        assert read_checkpoint(str(tmp_path / 'epoch_1.pth'))['meta']['epoch'] == 1
