"""Shows what the linear scaling layers are for, on handwritten digits, in seconds.

A small network whose convs are sums of four 3x3 branches of one shape is trained twice.
Without scaling, every branch gets the gradient of the sum: all of them take the same
steps, and when weight decay has removed what they were at the start, they are the same
kernel four times. With a trained scale for each branch and output channel, their
gradients differ, and they part (paper, section 3.2).
"""

import argparse
import itertools
from pathlib import Path
from typing import Optional

import pandas as pd
import torch
import torch.nn.functional as F
from charts import SERIES, panels, save, write_csv
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmorepa.cli import one_line_errors, positive
from mmorepa.functional import scaled_sum
from mmorepa.utils.files import check_outputs

BRANCHES, CHANNELS, BATCH = 4, 16, 64
# A hundred times the usual decay, since there are a thousand times fewer steps: what
# the weights were at the start has to go.
SGD = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
KINDS = dict(gradients='Gradients of the branches', kernels='Kernels of the branches')
ARMS = {'without scaling': False, 'with linear scaling': True}


class SummedConv2d(nn.Module):
    """A 3×3 conv that is a sum of branches, whose scales may be trained."""

    def __init__(self, in_channels: int, out_channels: int, is_scaled: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(BRANCHES, out_channels, in_channels, 3, 3)
        )
        for weight in self.weight:
            nn.init.kaiming_uniform_(weight)
        scale = torch.full((BRANCHES, out_channels), BRANCHES**-0.5)
        self.scale = nn.Parameter(scale, requires_grad=is_scaled)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, I, H, W) to (N, O, H, W)."""
        return F.conv2d(x, scaled_sum(self.weight.unbind(), self.scale), padding=1)

    def kernels(self) -> Tensor:
        """Those of the branches, shape (B, O, I, 3, 3)."""
        return (self.scale[..., None, None, None] * self.weight).detach()


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--epochs', type=positive, default=20, help='of each training (default: 20)'
    )
    parser.add_argument(
        '--seeds', type=positive, default=3, help='how many trainings (default: 3)'
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('scaling.png'),
        help='the PNG to write (default: scaling.png); its numbers go beside it, as '
        '.csv',
    )
    return parser.parse_args(argv)


def mean_cosine(kernels: list[Tensor]) -> float:
    """The mean over convs and pairs of branches."""
    above = torch.ones(BRANCHES, BRANCHES).triu(1).bool()
    rows = [F.normalize(each.flatten(1), dim=1) for each in kernels]
    return torch.stack([(r @ r.T)[above].mean() for r in rows]).mean().item()


def train(
    data: tuple[Tensor, Tensor], is_scaled: bool, seed: int, epochs: int
) -> list[dict]:
    """Trains a network of three such convs; gives what was measured by the epoch."""
    torch.manual_seed(seed)
    widths = (1, CHANNELS, CHANNELS, CHANNELS)
    convs = [SummedConv2d(i, o, is_scaled) for i, o in itertools.pairwise(widths)]
    blocks = [nn.Sequential(c, nn.BatchNorm2d(CHANNELS), nn.ReLU()) for c in convs]
    pool = nn.AdaptiveAvgPool2d(2)
    model = nn.Sequential(*blocks, pool, nn.Flatten(), nn.Linear(4 * CHANNELS, 10))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    images, labels = data
    rows = []
    for epoch in range(epochs + 1):
        losses = []
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            losses.append(loss.item())
            if epoch == 0:
                break  # Nothing but the gradients at the start.
            optimizer.step()
        row = dict(seed=seed, epoch=epoch, loss=sum(losses) / len(losses))
        row['gradients'] = mean_cosine([conv.weight.grad for conv in convs])
        row['kernels'] = mean_cosine([conv.kernels() for conv in convs])
        rows.append(row)
    return rows


def plot(rows: pd.DataFrame) -> Figure:
    """Cosines over the epochs: means over the seeds, and their range."""
    figure, (grid,) = panels(1, 2, 8, 4, sharey=True)
    for axes, (kind, title) in zip(grid, KINDS.items()):
        for arm, colour in zip(ARMS, SERIES):
            by_epoch = rows[rows.arm == arm].groupby('epoch')[kind]
            mean, low, high = by_epoch.mean(), by_epoch.min(), by_epoch.max()
            axes.plot(mean, '.-', color=colour, label=arm)
            axes.fill_between(mean.index, low, high, color=colour, alpha=0.2)
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)
    grid[0].set_ylabel('cosine, mean of all pairs')
    grid[0].set_ylim(min(-0.05, grid[0].get_ylim()[0]), 1.05)
    grid[0].legend(loc='lower left')
    return figure


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    numbers = args.out.with_suffix('.csv')
    check_outputs([args.out, numbers])
    # Shape (1797, 1, 8, 8), and the classes.
    digits, found = load_digits(), []
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    data = (images - images.mean()) / images.std(), torch.tensor(digits.target)
    for arm, is_scaled in ARMS.items():
        for seed in range(args.seeds):
            print(f'Training {arm}, {seed + 1} of {args.seeds} …', flush=True)
            measured = train(data, is_scaled, seed, args.epochs)
            found += [dict(arm=arm, **row) for row in measured]
    rows = pd.DataFrame(found)
    last = rows[rows.epoch == args.epochs].groupby('arm')[[*KINDS]].mean()
    print('Mean cosine of two branches after the last epoch:')
    print(last.loc[[*ARMS]].to_string(float_format='{:.4f}'.format))
    save(plot(rows), args.out)
    write_csv(rows.to_dict('records'), numbers)
    print(f'Wrote {args.out} and {numbers}.')


if __name__ == '__main__':
    main()
