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
from pathlib import Path
from typing import Optional

import pandas as pd
import studies
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor
from torch.func import functional_call, jvp, vjp
from trainings import merged

import mmorepa  # noqa: F401
from mmorepa.layers import ReparamConv2d
from mmorepa.utils.files import atomic_write

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


class StemDynamicsHook(Hook):
    """Measures after every so many steps, and keeps the rows in :attr:`rows`."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.rows: list[dict[str, float]] = []
        # Of the steps since the last measurement.
        self.gradients: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        """Looks for the stem, and waits for its gradients."""
        self.stem, self.handle = runner.model.backbone.stem, None
        self.stem.register_forward_pre_hook(self._listen)

    def _listen(self, stem: ReparamConv2d, args: tuple) -> None:
        if stem.training:
            if self.handle is not None:
                self.handle.remove()
            self.handle = stem.kernel().register_hook(self._take)

    def _take(self, gradient: Tensor) -> None:
        self.gradients.append(gradient.detach().double())

    def after_train_iter(self, runner: Runner, batch_idx: int, *args, **kwargs) -> None:
        """Measures."""
        if self.every_n_train_iters(runner, self.interval):
            gradients = torch.stack(self.gradients)
            power = gradients.square().flatten(1).sum(1).mean()
            row = measure(self.stem, gradients[-1])
            row['epoch'] = (runner.iter + 1) / len(runner.train_dataloader)
            row['signal'] = (gradients.mean(0).square().sum() / power).item()
            self.rows.append(row)
            self.gradients.clear()


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
    runner = Runner.from_cfg(merged(CONFIG, {**options, **changes}))
    hook = StemDynamicsHook(interval=10)
    runner.register_hook(hook)
    runner.train()
    return pd.DataFrame(hook.rows)


def table(results: dict[str, pd.DataFrame]) -> str:
    """Markdown: the mean of the first and of the last quarter of the trainings."""
    lines = []
    for name, rows in results.items():
        quarter = max(1, len(rows) // 4)
        first, last = rows[:quarter].mean(), rows[-quarter:].mean()
        cells = {key: f'{first[key]:.3g}, {last[key]:.3g}' for key in QUANTITIES}
        lines.append({'': name, **cells})
    return studies.markdown_table(lines)


def parse_args(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3, help='default: 3')
    parser.add_argument('--epochs', type=int, default=20, help='default: 20')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/stem_dynamics'))
    return parser.parse_args(argv)


def main(argv: Optional[list[str]] = None) -> None:
    """Trains every variant with every seed, and prints a table."""
    args = parse_args(argv)
    results = {}
    for name in args.variants:
        trainings = []
        for seed in range(args.seeds):
            folder = args.out / f'{[*VARIANTS].index(name)}-{seed}-{args.epochs}'
            rows = folder / 'rows.csv'
            if not rows.is_file():  # A run that was killed left those before.
                measured = train(VARIANTS[name], seed, args.epochs, folder)
                with atomic_write(rows) as file:
                    measured.to_csv(file)
            trainings.append(pd.read_csv(rows, index_col=0))
        # The mean of all seeds, moment by moment.
        results[name] = pd.concat(trainings).groupby(level=0).mean()
    print(table(results))


if __name__ == '__main__':
    main()
