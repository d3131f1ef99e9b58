"""What a training or a test shows on the screen."""

import atexit
import sys
from typing import Optional

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
        if 'train/loss' in runner.message_hub.log_scalars:
            loss = runner.message_hub.get_scalar('train/loss').current()
            text += f'  loss {loss:.4g}'
        self._show(text, runner.iter + 1, runner.max_iters)
        if is_last:  # Makes room for what comes between two epochs.
            self.after_run(runner)

    def after_test_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        if not self.is_shown:
            return
        total = len(runner.test_dataloader)
        self._show(f'batch {batch_idx + 1}/{total}', batch_idx + 1, total)
        if batch_idx + 1 == total:  # Makes room for the metrics.
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
            # Or an error would leave the terminal without a cursor.
            atexit.register(self.progress.stop)
        self.progress.update(
            self.progress.task_ids[0], description=text, completed=done
        )


def summary(runner: Runner) -> str:
    """What a training was asked for: lines of two columns."""
    cfg, model, loader = runner.cfg, unwrapped(runner.model), runner.train_dataloader
    backbone = cfg.get('model', {}).get('backbone') or {}
    weights = cfg.get('load_from') or (backbone.get('init_cfg') or {}).get('checkpoint')
    length = counted(runner.max_iters, 'iteration')
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        steps = counted(len(loader), 'step')
        length = f'{counted(runner.max_epochs, "epoch")} of {steps}'
    number = count_parameters(model) / 1e6
    rows = {
        'config': cfg.filename,
        'model': f'{type(model).__name__}, {number:.3g} million weights',
        'starts from': weights or 'random weights',
        'training data': counted(len(loader.dataset), 'image'),
        'length': f'{length}, {loader.batch_size} images each',
        'device': next(model.parameters()).device,
        'work folder': runner.work_dir,
        'everything else': f'{runner.log_dir}/{runner.timestamp}.log',
    }
    return '\n'.join(f'{name:16} {value}' for name, value in rows.items())
