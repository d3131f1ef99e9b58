"""What a training or a test shows on the screen."""

import atexit
import sys
from typing import Optional

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ...analysis import unwrapped
from ...analysis.complexity import count_parameters
from ...utils.tables import counted


@HOOKS.register_module()
class ProgressHook(Hook):
    """Says what will be trained, and shows one moving line: step, loss, time left.

    Args:
        is_shown (bool, optional): Show the line. Defaults to None: on terminals, since
            MMEngine's lines tell the progress elsewhere.
    """

    priority = 'LOWEST'

    def __init__(self, is_shown: Optional[bool] = None) -> None:
        self.is_shown = sys.stdout.isatty() if is_shown is None else is_shown
        self.is_shown &= is_main_process()
        self.progress: Optional[Progress] = None

    def before_train(self, runner: Runner) -> None:
        if is_main_process():
            print(summary(runner), flush=True)

    def before_train_epoch(self, runner: Runner) -> None:
        self._start(runner.max_iters, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        if self.progress is None:
            return
        text = f'iteration {runner.iter + 1}/{runner.max_iters}'
        if _counts_epochs(runner):
            text = f'epoch {runner.epoch + 1}/{runner.max_epochs}'
            text += f'  step {batch_idx + 1}/{len(runner.train_dataloader)}'
        scalars = runner.message_hub.log_scalars
        size = getattr(runner.train_dataloader, 'batch_size', None) or 1
        if 'train/loss' in scalars:
            text += f'  loss {scalars["train/loss"].current():.4g}'
        if 'train/time' in scalars:
            rate = size / max(scalars['train/time'].mean(10), 1e-9)
            text += f'  {rate:.3g} images/s'
        self._move(runner.iter + 1, text)
        if _counts_epochs(runner) and batch_idx + 1 == len(runner.train_dataloader):
            self._stop()  # Makes room for what comes between two epochs.

    def before_val(self, runner: Runner) -> None:
        self._stop()

    def after_val(self, runner: Runner) -> None:
        self._start(runner.max_iters, runner.iter)

    def before_test(self, runner: Runner) -> None:
        self._start(len(runner.test_dataloader))

    def after_test_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        total = len(runner.test_dataloader)
        self._move(batch_idx + 1, f'batch {batch_idx + 1}/{total}')
        if batch_idx + 1 == total:  # Before the metrics.
            self._stop()

    def after_run(self, runner: Runner) -> None:
        self._stop()

    def _start(self, total: int, done: int = 0) -> None:
        if self.is_shown and self.progress is None:
            self.progress = Progress(
                TextColumn('{task.description}'),
                BarColumn(20),
                TimeRemainingColumn(),
                TextColumn('left'),
                console=Console(file=sys.stdout),
                refresh_per_second=4,
                transient=True,
            )
            self.progress.add_task('starting', total=total, completed=done)
            self.progress.start()
            # Or an error would leave the terminal without a cursor.
            atexit.register(self.progress.stop)

    def _move(self, done: int, text: str) -> None:
        if self.progress is not None:
            task = self.progress.task_ids[0]
            self.progress.update(task, completed=done, description=text)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            atexit.unregister(self.progress.stop)
            self.progress = None


def _counts_epochs(runner: Runner) -> bool:
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def summary(runner: Runner) -> str:
    """What a training was asked for: lines of two columns."""
    cfg, model = runner.cfg, unwrapped(runner.model)
    loader = runner.train_dataloader
    backbone = type(getattr(model, 'backbone', None)).__name__
    number = count_parameters(model) / 1e6
    images = counted(len(loader.dataset), 'image')
    classes = (getattr(loader.dataset, 'metainfo', None) or {}).get('classes')
    if classes:
        images += f', {len(classes)} class{"es" if len(classes) > 1 else ""}'
    length = counted(runner.max_iters, 'iteration')
    if _counts_epochs(runner):
        steps = counted(len(loader), 'step')
        length = f'{counted(runner.max_epochs, "epoch")} of {steps}'
    network = cfg.get('model', {}).get('backbone') or {}
    weights = cfg.get('load_from') or (network.get('init_cfg') or {}).get('checkpoint')
    optimizer = cfg.get('optim_wrapper', {}).get('optimizer') or {}
    device = str(next(model.parameters()).device)
    if device == 'cpu':
        device += f', {counted(torch.get_num_threads(), "thread")}'
    rows = {
        'config': cfg.filename,
        'model': f'{type(model).__name__}, {backbone}, {number:.3g} million weights',
        'block': network.get('block'),
        'starts from': weights or 'random weights',
        'training data': images,
        'validation data': runner.val_loop
        and counted(len(runner.val_loop.dataloader.dataset), 'image'),
        'length': f'{length}, {loader.batch_size} images each',
        'learning rate': optimizer.get('lr'),
        'device': device,
        'work folder': runner.work_dir,
        'everything else': f'{runner.log_dir}/{runner.timestamp}.log',
    }
    return '\n'.join(f'{k:16} {v}' for k, v in rows.items() if v is not None)
