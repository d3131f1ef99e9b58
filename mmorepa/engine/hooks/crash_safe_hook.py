"""Exact resumption of a training that was killed at any moment."""

import os
from pathlib import Path
from typing import Any, ClassVar, Union

from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, set_random_seed
from torch.utils.data import BatchSampler

from ...utils.files import atomic_write
from ..seeding import SeededBatches, seed_of


@HOOKS.register_module()
class CrashSafeHook(Hook):
    """Lets a killed training, once resumed, go on as if nothing had happened.

    - Checkpoints are written under another name and renamed when they are complete.
      Outdated ones are removed after that. ``CheckpointHook`` alone removes them first.
    - Every random number, also of the workers, is a function of the seed, the rank and
      the iteration.
    - A resumed training first validates a checkpoint that was saved before its
      validation. Otherwise the best score would be lost.
    - An iteration-based loop with an ``InfiniteSampler`` resumes at its batch. MMEngine
      0.10 loads all batches before it again.

    Two things are lost: gradients that were accumulated for a step, and caches of
    transforms, such as mmdet's ``CachedMosaic``.

    Examples:
        >>> custom_hooks = [dict(type='CrashSafeHook')]
    """

    # After CheckpointHook, which sets its folder first.
    priority = 'LOWEST'

    _is_validated = True

    def before_run(self, runner: Runner) -> None:
        """Makes MMEngine write local files atomically."""
        register_backend('local', _WholeFileBackend, force=True, prefixes='')

    def before_train(self, runner: Runner) -> None:
        """Postpones removals, seeds the data, and validates if it is due."""
        _WholeFileBackend.outdated.clear()  # The last training may have failed to save.
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                if isinstance(hook.file_backend, LocalBackend):
                    hook.file_backend = _PostponedRemovals()
                if is_main_process():
                    _remove_temporary_files(Path(hook.out_dir))
        self._seed_data(runner)
        # MMEngine saves, validates, and then saves the best checkpoint.
        if not self._is_validated and self._is_validation_due(runner):
            runner.val_loop.run()

    def _is_validation_due(self, runner: Runner) -> bool:
        loop = runner.train_loop
        done, end = loop.iter, loop.max_iters
        if self._by_epoch:
            done, end = loop.epoch, loop.max_epochs
        return (
            runner.val_loop is not None
            and done >= max(loop.val_begin, 1)
            and (done % loop.val_interval == 0 or done == end)
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Saves whether these weights are validated."""
        checkpoint.setdefault('meta', {})['is_validated'] = self._is_validated

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Reads whether these weights are validated."""
        self._is_validated = checkpoint.get('meta', {}).get('is_validated', True)

    def after_val_iter(self, runner: Runner, **kwargs) -> None:
        """Notes that the weights are validated, for a checkpoint saved after it."""
        self._is_validated = True

    def _seed_data(self, runner: Runner) -> None:
        loop = runner.train_loop
        loader, batches = loop.dataloader, loop.dataloader.batch_sampler
        self._by_epoch = not hasattr(loop, 'dataloader_iterator')
        if isinstance(batches, SeededBatches):  # A second training of this runner.
            batches = batches.batches
        sampler = getattr(batches, 'sampler', None)
        # An iteration-based loop has begun to load already. These samplers can be set
        # back to their start.
        can_start_anew = type(batches) is BatchSampler and isinstance(
            sampler, (DefaultSampler, InfiniteSampler)
        )
        if batches is None or not (self._by_epoch or can_start_anew):
            self._batches = None
            runner.logger.warning(
                f'{type(batches).__name__} of {type(sampler).__name__} cannot be set '
                'back: a resumed training will see other data'
            )
            return
        self._batches = SeededBatches(batches, runner.seed, get_rank(), 0)
        # DataLoader's setter refuses a change of its batch sampler.
        vars(loader).update(batch_sampler=self._batches, _iterator=None)
        if self._by_epoch:
            return
        former = loop.dataloader_iterator
        if isinstance(former, _Advanced):  # A second training, again.
            former = former.iterator
        endless = type(former)
        if isinstance(sampler, InfiniteSampler):
            sampler.indices = sampler._indices_of_rank()
            self._batches.first = runner.iter
            loop.dataloader_iterator = _Advanced(endless(loader), runner.iter)
        else:
            loop.dataloader_iterator = endless(loader)

    def before_train_epoch(self, runner: Runner) -> None:
        """Numbers the batches of this epoch."""
        if self._batches is not None and self._by_epoch:
            self._batches.number = runner.iter
        self.before_train_iter(runner, 0)  # For samplers without a seed.

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Seeds the random numbers of the model."""
        self._is_validated = False
        set_random_seed(seed_of(runner.seed, get_rank(), 1, runner.iter))


def _remove_temporary_files(folder: Path) -> None:
    """Removes files that atomic_write() began in processes that were killed."""
    for path in folder.glob('.[0-9]*.*.pth'):
        pid = path.name.split('.')[1]
        if pid.isdecimal() and not _is_another_process(int(pid)):
            path.unlink()


def _is_another_process(pid: int) -> bool:
    """Whether this is the id of a running process other than this one."""
    if os.name != 'posix':
        return True  # Not known: on Windows, os.kill() would end the process.
    try:
        os.kill(pid, 0)  # This sends no signal.
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # The process belongs to another user.
        return True
    return pid != os.getpid()


class _WholeFileBackend(LocalBackend):
    """A local file backend that writes atomically, and removes outdated files then."""

    outdated: ClassVar[set[str]] = set()

    def put(self, obj: Union[bytes, memoryview], filepath: Union[str, Path]) -> None:
        with atomic_write(filepath) as file:
            file.write_bytes(obj)
        for path in self.outdated - {os.path.realpath(filepath)}:
            Path(path).unlink(missing_ok=True)
        self.outdated.clear()


class _PostponedRemovals(LocalBackend):
    """A local file backend whose removals wait until the next file is written."""

    def remove(self, filepath: Union[str, Path]) -> None:
        _WholeFileBackend.outdated.add(os.path.realpath(filepath))


class _Advanced:
    """MMEngine's endless iterator, for a sampler that has skipped ``steps`` batches."""

    def __init__(self, iterator: Any, steps: int) -> None:
        self.iterator = iterator
        # MMEngine calls next() for each of the steps. OneDL calls skip_iter() once.
        self.calls_to_ignore = 0 if hasattr(iterator, 'skip_iter') else steps

    def __next__(self) -> Any:
        if self.calls_to_ignore:
            self.calls_to_ignore -= 1
            return None
        return next(self.iterator)

    def skip_iter(self, steps: int) -> None:
        pass
