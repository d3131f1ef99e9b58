"""Measures what a re-parameterised network costs in training and deployed.

For each config, the network of MMPretrain, the plain network in both layouts, DBB, and
OREPA with a naive fold, with online folding and with folded training are trained in
turn, one step each in every round, so that all of them meet the same machine; figures
are medians over the rounds. Prints tables, and writes them as JSON and as a chart.
Nothing is learned: the images are noise.
"""

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import positive  # Sets how threads wait, before PyTorch is loaded.

# isort: split

import pandas as pd
import step_costs as costs
import studies
import torch
import torch.distributed as dist
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from studies import charts

from mmorepa.analysis.timing import Clock, busy_warning
from mmorepa.cli import one_line_errors
from mmorepa.functional import compiled
from mmorepa.hub import get_config
from mmorepa.utils.files import check_outputs, write_json

# The networks that this is about, with as many images as suit a small machine.
DEFAULT = {
    'configs/imagenet/resnet18-orepa_4xb64_in1k.py': 16,
    'configs/imagenet/resnet50-orepa_4xb64_in1k.py': 8,
}
# The batch of the paper, for each GPU.
PAPER_BATCH = 64
COLOURS = {
    'plain, default layout': charts.GREY,
    'plain': charts.BLACK,
    'plain, OREPA stem': charts.VERMILION,
    'DBB': charts.ORANGE,
    'OREPA, naive': charts.PURPLE,
    'OREPA, online': charts.SKY,
    'OREPA, folded, default layout': charts.GREEN,
    'OREPA, folded': charts.BLUE,
    'OREPA, captured': charts.YELLOW,
}


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Measures what training a re-parameterised network costs.'
    )
    parser.add_argument(
        'configs',
        nargs='*',
        default=[*DEFAULT],
        help='configs of OREPA classifiers; ResNet-18 and ResNet-50 by default',
    )
    parser.add_argument(
        '--batch-size',
        type=positive,
        help='images a step (default: 16, but 8 for the default ResNet-50)',
    )
    parser.add_argument('--size', type=positive, default=224, help='of the images')
    parser.add_argument('--rounds', type=positive, default=15)
    parser.add_argument('--threads', type=positive, default=2, help='of the CPU')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/train_cost'))
    return parser.parse_args(argv)


class Costs(NamedTuple):
    """All figures of one config; frames have a row for each way to train or infer."""

    name: str
    batch_size: int
    steps: pd.DataFrame
    fold: pd.DataFrame
    inference: pd.DataFrame
    # What folded training adds to the plain step, in seconds.
    added: float
    core_share: float


def measure(path: str, args: argparse.Namespace) -> Costs:
    """Measures one config."""
    cfg = get_config(str(studies.ROOT / path))
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    clock, batch_size = Clock(args.device), args.batch_size or DEFAULT.get(path, 16)
    torch.manual_seed(1)
    channels = cfg.model.backbone.get('in_channels', 3)
    shape = batch_size, channels, args.size, args.size
    images = torch.randn(shape, device=args.device)
    labels = torch.randint(10, (batch_size,))
    samples = [DataSample().set_gt_label(label).to(args.device) for label in labels]
    batch = (images, samples)

    is_resnet = cfg.model.backbone.type.endswith('ResNet')
    trainers = {
        name: costs.Trainer(cfg, name, args.device)
        for name, (backbone, options) in costs.VARIANTS.items()
        if (is_resnet or 'stem_block' not in backbone)
        and (clock.is_cuda or 'capture' not in options)
    }
    forward_backward, optimizer = costs.measure_steps(
        trainers, batch, args.rounds, clock
    )
    seconds = forward_backward + optimizer
    kept = {n: costs.measure_bytes(trainer, batch) for n, trainer in trainers.items()}
    steps = costs.times(seconds, costs.STOCK).assign(
        forward_backward=forward_backward.median(), optimizer=optimizer.median()
    )
    steps = steps.join(pd.DataFrame(kept).T)
    if clock.is_cuda:
        steps['peak_memory_bytes'] = [
            costs.measure_peak_memory(trainer, batch) for trainer in trainers.values()
        ]
    fold = costs.measure_fold(trainers['OREPA, online'].network, args.rounds, clock)
    trainers.clear()
    return Costs(
        name=Path(path).stem,
        batch_size=batch_size,
        steps=steps,
        fold=fold,
        inference=costs.measure_inference(cfg, images, args.rounds, clock),
        added=(seconds[costs.OREPA] - seconds[costs.PLAIN]).median(),
        core_share=clock.core_share,
    )


def print_tables(found: Costs, args: argparse.Namespace) -> None:
    """Prints the figures of one config as tables."""
    print(
        f'\n{found.name}: {found.batch_size} images of {args.size}x{args.size}, '
        f'medians over {args.rounds} rounds in turn, [quartiles]\n'
    )

    def show(head: str, columns: dict[str, pd.Series]) -> None:
        table = pd.DataFrame(columns).rename_axis(columns=head)
        print(table.to_string(float_format='{:.1f}'.format), end='\n\n')

    def ratios(times: pd.DataFrame) -> list[str]:
        rows = zip(times.ratio, times.low, times.high)
        return [f'{ratio:.2f} [{low:.2f}, {high:.2f}]' for ratio, low, high in rows]

    steps, fold, inference = found.steps, found.fold, found.inference
    columns = {
        'step (ms)': steps.seconds * 1e3,
        'x stock': ratios(steps),
        'forward+backward': steps.forward_backward * 1e3,
        'optimizer phase': steps.optimizer * 1e3,
    }
    show('training', columns)
    kept = {
        'saved_bytes': 'saved for backward',
        'parameter_bytes': 'parameters',
        'gradient_bytes': 'gradients',
        'optimizer_bytes': 'optimizer',
        'all_reduced_bytes': 'all-reduced',
        'peak_memory_bytes': 'peak of a step',
    }
    show('MB', {text: steps[key] / 1e6 for key, text in kept.items() if key in steps})
    columns = {'ms': fold.seconds * 1e3, 'x floor': ratios(fold)}
    show('all folds, with derivatives', columns)
    plain = steps.seconds[costs.PLAIN] * PAPER_BATCH / found.batch_size
    # The fold does not know the batch, and the plain step grows with it.
    print(
        f'Folded training adds {found.added * 1e3:.1f} ms to the plain step: '
        f'{found.added / fold.seconds["floor"]:.2f} x the floor. With {PAPER_BATCH} '
        f'images a step, that would be {1 + found.added / plain:.3f} x plain.\n'
    )
    columns = {'ms': inference.seconds * 1e3, 'x plain, folded': ratios(inference)}
    show('inference', columns)
    if warning := busy_warning(found.core_share):
        print(warning)


def plot(results: Sequence[Costs], path: Path) -> None:
    """Draws what a step costs over the stock network's, one panel for each budget."""
    titles = dict(seconds='time of a step', saved_bytes='saved for backward')
    titles['all_reduced_bytes'] = 'all-reduced'
    figure, ((*axes,),) = charts.panels(1, len(titles), 10, 4.8)
    for axis, (key, title) in zip(axes, titles.items()):
        bars = {}
        for found in results:
            network = found.name.split('-orepa')[0]
            values = found.steps.ratio
            if key != 'seconds':
                values = found.steps[key] / found.steps[key][costs.STOCK]
            bars[f'{network}\n{found.batch_size} images'] = values
        pd.DataFrame(bars).T.drop(columns=costs.STOCK).plot.bar(
            ax=axis, color=COLOURS, width=0.8, rot=0, legend=False
        )
        for bar in axis.containers:
            axis.bar_label(bar, fmt='%.2f', rotation=90, padding=3)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_title(f'{title}, x stock')
        axis.margins(y=0.18)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4
    )
    charts.save(figure, path)


def machine(args: argparse.Namespace) -> str:
    if torch.device(args.device).type == 'cuda':
        name = torch.cuda.get_device_name()
    else:
        lines = Path('/proc/cpuinfo')
        text = lines.read_text() if lines.is_file() else ''
        match = re.search(r'model name\s*: (.*)', text)
        name = match[1] if match else platform.processor()
        name += f', {args.threads} threads'
        is_compiled = compiled.is_available()
        name += ', folds compiled' if is_compiled else ', folds not compiled'
    return f'{name}, PyTorch {torch.__version__}'


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    figures, chart = args.out / 'train_cost.json', args.out / 'train_cost.png'
    check_outputs([figures, chart], [studies.ROOT / path for path in args.configs])
    torch.set_num_threads(args.threads)
    # Without the tables of parameter groups.
    MMLogger.get_instance('train_cost', log_level='WARNING')
    backend = 'nccl' if torch.device(args.device).type == 'cuda' else 'gloo'
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    results = []
    for path in args.configs:
        results.append(measure(path, args))
        print_tables(results[-1], args)
    dist.destroy_process_group()
    document = dict(machine=machine(args), size=args.size, rounds=args.rounds)
    document['results'] = [
        {
            key: value.to_dict('index') if isinstance(value, pd.DataFrame) else value
            for key, value in found._asdict().items()
        }
        for found in results
    ]
    write_json(document, figures)
    plot(results, chart)
    print(f'\n{document["machine"]}')
    print(f'Figures: {figures}   Chart: {chart}')


if __name__ == '__main__':
    main()
