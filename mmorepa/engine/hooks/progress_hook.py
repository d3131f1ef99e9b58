"""Shows a training or a test on the screen."""

import atexit
import sys
from typing import Optional

import torch
from mmengine.dist import is_main_process, master_only
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
    """Prints what will be trained, and shows one moving line: step, loss, time left.

    Args:
        is_shown (bool, optional): Whether to show the moving line. Defaults to None,
            which shows it on terminals; elsewhere, MMEngine logs the progress.
    """

    priority = 'LOWEST'

    def __init__(self, is_shown: Optional[bool] = None) -> None:
        self.is_shown = sys.stdout.isatty() if is_shown is None else is_shown
        self.is_shown &= is_main_process()
        self.progress: Optional[Progress] = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        print(summary(runner), flush=True)

    def after_train_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        if not self.is_shown:
            return
        text, is_last = f'iteration {runner.iter + 1}/{runner.max_iters}', False
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            steps = len(runner.train_dataloader)
            is_last = batch_idx + 1 == steps
            text = f'epoch {runner.epoch + 1}/{runner.max_epochs}'
            text += f'  step {batch_idx + 1}/{steps}'
        scalars = runner.message_hub.log_scalars
        if 'train/loss' in scalars:
            text += f'  loss {scalars["train/loss"].current():.4g}'
        batch_size = runner.train_dataloader.batch_size
        if 'train/time' in scalars and batch_size is not None:
            rate = batch_size / max(scalars['train/time'].mean(10), 1e-9)
            text += f'  {rate:.3g} images/s'
        self._show(text, runner.iter + 1, runner.max_iters)
        if is_last:  # The line would hide what is logged between two epochs.
            self.after_run(runner)

    def after_test_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        if not self.is_shown:
            return
        total = len(runner.test_dataloader)
        self._show(f'batch {batch_idx + 1}/{total}', batch_idx + 1, total)
        if batch_idx + 1 == total:  # The line would hide the metrics.
            self.after_run(runner)

    def after_run(self, runner: Runner) -> None:
        if self.progress is not None:
            self.progress.stop()
            atexit.unregister(self.progress.stop)
            self.progress = None

    before_val = after_run

    def _show(self, text: str, done: int, total: int) -> None:
        if self.progress is None:
            self.progress = Progress(
                TextColumn('{task.description}'),
                BarColumn(20),
                TimeRemainingColumn(),
                TextColumn('left'),
                console=Console(file=sys.stdout),
                refresh_per_second=4,
                transient=True,
            )
            self.progress.add_task(text, total=total, completed=done)
            self.progress.start()
            # Without this, an error would leave the terminal without a cursor.
            atexit.register(self.progress.stop)
        self.progress.update(
            self.progress.task_ids[0], description=text, completed=done
        )


def summary(runner: Runner) -> str:
    """Describes a training in lines of two columns."""
    cfg, model, loader = runner.cfg, unwrapped(runner.model), runner.train_dataloader
    backbone = cfg.get('model', {}).get('backbone') or {}
    weights = cfg.get('load_from') or (backbone.get('init_cfg') or {}).get('checkpoint')
    networks = [type(model).__name__]
    if hasattr(model, 'backbone'):
        networks.append(type(model.backbone).__name__)
    images = counted(len(loader.dataset), 'image')
    classes = (getattr(loader.dataset, 'metainfo', None) or {}).get('classes')
    if classes:
        images += f', {len(classes)} class{"es" if len(classes) > 1 else ""}'
    length = counted(runner.max_iters, 'iteration')
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        steps = counted(len(loader), 'step')
        length = f'{counted(runner.max_epochs, "epoch")} of {steps}'
    optimizer = cfg.get('optim_wrapper', {}).get('optimizer') or {}
    device = str(next(model.parameters()).device)
    if device == 'cpu':
        device += f', {counted(torch.get_num_threads(), "thread")}'
    number = count_parameters(model) / 1e6
    rows = {
        'config': cfg.filename,
        'model': f'{", ".join(networks)}, {number:.3g} million weights',
        'block': backbone.get('block'),
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
