"""Measures how the kernel of a ResNet's stem moves while it trains.

Every few steps, of the folded kernel W, shape (O, I·k²), and its gradient G:

- rate: ``⟨G, JJᵀG⟩/|G|²``, by which branches multiply a step of SGD along G
  (``J = dW/dθ``; 1 of a plain kernel);
- angle: that over ``|W|²/O``, since BatchNorm undoes the length of W;
- rank: ``|W|²/σ₁²``, the stable rank;
- roughness: the mean square of the difference of two neighbouring taps, relative to
  that of a tap;
- signal: ``|mean G|²/mean |G|²`` over the steps between two measurements;
- gamma: the mean size of the weights of the BatchNorm behind it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pandas as pd
import studies
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from torch.func import functional_call, jvp, vjp
from trainings import merged

import mmorepa  # noqa: F401
from mmorepa.layers import ReparamConv2d

CONFIG = (
    studies.ROOT / 'configs/fashion_mnist/resnet18-slim_1xb64_fashion-mnist-10pct.py'
)
_STEM = 'model.backbone.stem_block'
_FASTER = dict(custom_keys={'backbone.stem': dict(lr_mult=4.0)})
VARIANTS = {
    'plain': {},
    'plain, stem at 4 x the rate': {'optim_wrapper.paramwise_cfg': _FASTER},
    'OREPA stem': {_STEM: 'orepa'},
    'deep linear stem': {_STEM: 'deep_linear'},
    'OREPA': {'model.backbone.block': 'orepa'},
    'OREPA, plain stem': {'model.backbone.block': 'orepa', _STEM: 'plain'},
}
QUANTITIES = ('rate', 'angle', 'rank', 'roughness', 'signal', 'gamma')


@HOOKS.register_module()
class StemDynamicsHook(Hook):
    """Measures every so many steps, and keeps the rows in :attr:`rows`."""

    rows: list[dict[str, float]] = []

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        """Looks for the stem, and waits for its gradients."""
        type(self).rows = []
        self.stem = runner.model.backbone.stem
        self.sum, self.squares, self.count = 0.0, 0.0, 0
        self.handle: Any = None
        self.gradient: Optional[Tensor] = None
        self.stem.register_forward_pre_hook(self._listen)

    def _listen(self, stem: ReparamConv2d, args: tuple) -> None:
        if not stem.training:
            return
        if self.handle is not None:
            self.handle.remove()
        self.handle = stem.kernel().register_hook(self._take)

    def _take(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach().double().clone()

    def after_train_iter(self, runner: Runner, batch_idx: int, *args, **kwargs) -> None:
        """Measures."""
        assert self.gradient is not None
        self.sum = self.sum + self.gradient
        self.squares = self.squares + self.gradient.square().sum()
        self.count += 1
        if not self.every_n_train_iters(runner, self.interval):
            return
        row = dict(epoch=(runner.iter + 1) / len(runner.train_dataloader))
        signal = (self.sum / self.count).square().sum() / (self.squares / self.count)
        row.update(measure(self.stem, self.gradient), signal=signal.item())
        self.rows.append(row)
        self.sum, self.squares, self.count = 0.0, 0.0, 0


def measure(stem: ReparamConv2d, gradient: Tensor) -> dict[str, float]:
    """The quantities of one moment.

    Args:
        stem (ReparamConv2d): In training form, with a BatchNorm.
        gradient (Tensor): Of its folded kernel, shape (O, I, k, k), in float64.
    """
    parameters = {n: p.detach().double() for n, p in stem.branches.named_parameters()}

    def kernel(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(stem.branches, parameters, ())

    weight, pull_back = vjp(kernel, parameters)
    # What weight decay and momentum add is alike for all.
    (direction,) = pull_back(gradient)
    _, step = jvp(kernel, (parameters,), (direction,))
    rate = (gradient * step).sum() / gradient.square().sum()
    power = weight.square().sum()
    differences = [weight.diff(dim=dim).square().mean() for dim in (2, 3)]
    return dict(
        rate=rate.item(),
        angle=(rate * len(weight) / power).item(),
        rank=(power / torch.linalg.matrix_norm(weight.flatten(1), 2) ** 2).item(),
        roughness=(sum(differences) / 2 / weight.square().mean()).item(),
        gamma=stem.norm.weight.abs().mean().item(),
    )


def train(options: dict, seed: int, epochs: int, folder: Path) -> pd.DataFrame:
    """Trains, and returns the rows of the hook."""
    changes = {
        'randomness.seed': seed,
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs,
        'work_dir': str(folder),
        'log_level': 'WARNING',
        'default_hooks.checkpoint': None,
        'experiment_name': folder.name,
    }
    cfg = merged(CONFIG, {**options, **changes})
    cfg.custom_hooks = [dict(type='StemDynamicsHook', interval=10)]
    Runner.from_cfg(cfg).train()
    return pd.DataFrame(StemDynamicsHook.rows)


def table(results: dict[str, pd.DataFrame]) -> str:
    """Markdown: the mean of the first and of the last quarter of the trainings."""
    lines = []
    for name, rows in results.items():
        quarter = max(1, len(rows) // 4)
        first, last = rows[:quarter].mean(), rows[-quarter:].mean()
        cells = {key: f'{first[key]:.3g}, {last[key]:.3g}' for key in QUANTITIES}
        lines.append({'': name, **cells})
    return studies.markdown_table(lines)


def draw(results: dict[str, pd.DataFrame], path: Path) -> None:
    """All quantities against the epochs."""
    figure, axes = studies.panels(2, 3, 12, 6, sharex=True)
    for axis, quantity in zip(axes.flat, QUANTITIES):
        for name, rows in results.items():
            axis.plot(rows.epoch, rows[quantity], label=name)
        axis.set(title=quantity, xlabel='epoch')
        if quantity in ('rate', 'angle', 'signal'):
            axis.set_yscale('log')
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc='outside lower center', ncols=len(results))
    studies.save(figure, path)


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3, help='default: 3')
    parser.add_argument('--epochs', type=int, default=20, help='default: 20')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/stem_dynamics'))
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Trains every variant with every seed; prints a table and draws a figure."""
    args = parse_args(argv)
    results = {}
    for name in args.variants:
        trainings = []
        for seed in range(args.seeds):
            folder = args.out / f'{[*VARIANTS].index(name)}-{seed}-{args.epochs}'
            rows = folder / 'rows.csv'
            if not rows.is_file():  # A run that was killed left those before.
                print(f'{name}, seed {seed}', file=sys.stderr)
                measured = train(VARIANTS[name], seed, args.epochs, folder)
                measured.to_csv(f'{rows}.part')
                Path(f'{rows}.part').replace(rows)
            trainings.append(pd.read_csv(rows, index_col=0))
        # The mean of all seeds, moment by moment.
        results[name] = pd.concat(trainings).groupby(level=0).mean()
    draw(results, args.out / 'stem_dynamics.png')
    print(table(results))


if __name__ == '__main__':
    main()
