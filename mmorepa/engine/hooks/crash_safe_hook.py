"""Exact resumption of a training that was killed at any moment."""

from pathlib import Path
from typing import Any, Union

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

    - Checkpoints are written under another name and renamed when whole. A
      ``CheckpointHook`` with ``max_keep_ckpts=1`` keeps two: it removes an outdated one
      before it writes the next.
    - Every random number, the workers' too, is a function of the seed, the rank and
      the iteration.
    - A checkpoint that was saved before its validation is validated first, or the best
      score would be lost.
    - An iteration-based loop with an ``InfiniteSampler`` resumes at its batch without
      loading those before, as MMEngine 0.10 does.

    Lost are gradients that were accumulated for a step, and caches of transforms
    (mmdet's ``CachedMosaic``).

    Examples:
        >>> custom_hooks = [dict(type='CrashSafeHook')]
    """

    # After CheckpointHook, which knows its folder then.
    priority = 'LOWEST'

    _is_validated = True

    def before_run(self, runner: Runner) -> None:
        """Makes MMEngine write local files atomically, and keep one that is whole."""
        register_backend('local', _WholeFileBackend, force=True, prefixes='')
        for hook in _savers(runner):
            if hook.max_keep_ckpts == 1:
                hook.max_keep_ckpts = 2

    def before_train(self, runner: Runner) -> None:
        """Removes what kills have left, seeds the data, and validates if it is due."""
        if is_main_process():
            for hook in _savers(runner):
                # What atomic_write has begun, and a kill has not let it finish.
                for path in Path(hook.out_dir).glob('.[0-9]*.pth'):
                    path.unlink()
        self._seed_data(runner)
        # MMEngine saves, validates, and saves again only what is better than before.
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
        """Notes whether these weights are validated."""
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
        sampler = getattr(batches, 'sampler', None)
        # An iteration-based loop has begun to load already. These can start anew.
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
        # DataLoader refuses this by its setter; a new one would start the same way.
        vars(loader).update(batch_sampler=self._batches, _iterator=None)
        if self._by_epoch:
            return
        endless = type(loop.dataloader_iterator)
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


def _savers(runner: Runner) -> list[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


class _WholeFileBackend(LocalBackend):
    """A local file backend that writes atomically."""

    def put(self, obj: Union[bytes, memoryview], filepath: Union[str, Path]) -> None:
        with atomic_write(filepath) as file:
            file.write_bytes(obj)


class _Advanced:
    """MMEngine's endless iterator, of a sampler that has left out ``steps`` batches."""

    def __init__(self, iterator: Any, steps: int) -> None:
        self.iterator = iterator
        # MMEngine calls next() for each of them, OneDL's skip_iter() for all.
        self.left = 0 if hasattr(iterator, 'skip_iter') else steps

    def __next__(self) -> Any:
        if self.left:
            self.left -= 1
            return None
        return next(self.iterator)

    def skip_iter(self, steps: int) -> None:
        pass
