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
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import positive  # Sets how threads wait, before PyTorch is loaded.

# isort: split

import pandas as pd
import step_costs as costs
import studies
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample

from mmorepa.analysis.timing import Clock, busy_warning
from mmorepa.cli import one_line_errors
from mmorepa.functional import compiled
from mmorepa.hub import get_config
from mmorepa.utils.files import check_outputs, write_json

# The networks that this is about, with as many images as suit a small machine.
DEFAULT = (
    ('configs/imagenet/resnet18-orepa_4xb64_in1k.py', 16),
    ('configs/imagenet/resnet50-orepa_4xb64_in1k.py', 8),
)
# The batch of the paper, for each GPU.
PAPER_BATCH = 64
COLOURS = {
    'plain, default layout': studies.GREY,
    'plain': studies.BLACK,
    'plain, OREPA stem': studies.VERMILION,
    'DBB': studies.ORANGE,
    'OREPA, naive': studies.PURPLE,
    'OREPA, online': studies.SKY,
    'OREPA, folded, default layout': studies.GREEN,
    'OREPA, folded': studies.BLUE,
    'OREPA, captured': studies.YELLOW,
}


def device(text: str) -> str:
    """A device that is there, as the type of an argument."""
    try:
        torch.empty(0, device=text)
    except Exception as error:
        raise argparse.ArgumentTypeError(f'{text!r} cannot be used: {error}') from error
    return text


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Measures what training a re-parameterised network costs.'
    )
    parser.add_argument(
        'configs',
        nargs='*',
        help='configs of OREPA classifiers; ResNet-18 and ResNet-50 by default',
    )
    parser.add_argument(
        '--batch-size',
        type=positive,
        nargs='+',
        help='images a step: one figure, or one for each config; default 16, but 8 '
        'for the default ResNet-50',
    )
    parser.add_argument('--size', type=positive, default=224, help='of the images')
    parser.add_argument('--rounds', type=positive, default=15)
    parser.add_argument('--threads', type=positive, default=2, help='of the CPU')
    parser.add_argument(
        '--device', type=device, default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument(
        '--amp', choices=('bfloat16', 'float16'), help='train in mixed precision'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/train_cost'))
    args = parser.parse_args(argv)
    defaults = DEFAULT if not args.configs else [(c, 16) for c in args.configs]
    sizes = args.batch_size or [size for _, size in defaults]
    if len(sizes) == 1:
        sizes = sizes * len(defaults)
    if len(sizes) != len(defaults):
        parser.error(
            f'--batch-size takes one figure, or one for each of the {len(defaults)} '
            f'configs; found {len(sizes)}'
        )
    args.runs = [(config, size) for (config, _), size in zip(defaults, sizes)]
    return args


def load(path: str) -> Config:
    cfg = get_config(str(studies.ROOT / path))
    if (
        cfg.model.get('type') != 'ImageClassifier'
        or cfg.model.backbone.get('block') != 'orepa'
    ):
        raise ValueError(
            f"{path}: this takes classifiers whose backbone has block='orepa'"
        )
    return cfg


def measure(path: str, cfg: Config, batch_size: int, args: argparse.Namespace) -> dict:
    """All figures of one config."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    clock = Clock(args.device)
    torch.manual_seed(1)
    channels = cfg.model.backbone.get('in_channels', 3)
    shape = batch_size, channels, args.size, args.size
    images = torch.randn(shape, device=args.device)
    labels = torch.randint(10, (batch_size,))
    samples = [DataSample().set_gt_label(label).to(args.device) for label in labels]
    batch = (images, samples)

    is_resnet = cfg.model.backbone.type.endswith('ResNet')
    trainers = {
        name: costs.Trainer(cfg, variant, args.device, args.amp)
        for name, variant in costs.VARIANTS.items()
        if (is_resnet or not variant.stem) and (clock.is_cuda or not variant.capture)
    }
    steps = costs.measure_steps(trainers, batch, args.rounds, clock)
    for name, trainer in trainers.items():
        steps[name].update(costs.measure_bytes(trainer, batch))
        steps[name]['all_reduced_bytes'] = costs.measure_all_reduced(trainer, batch)
        if clock.is_cuda:
            steps[name]['peak_memory_bytes'] = costs.measure_peak_memory(trainer, batch)
    fold = costs.measure_fold(trainers['OREPA, online'].network, args.rounds, clock)
    trainers.clear()
    inference = costs.measure_inference(cfg, images, args.rounds, clock)
    (plain, *_), (added, *_) = steps[costs.PLAIN]['step'], steps[costs.OREPA]['added']
    return dict(
        config=path,
        batch_size=batch_size,
        image_size=args.size,
        rounds=args.rounds,
        steps=steps,
        fold=fold,
        inference=inference,
        core_share=clock.core_share,
        added_over_floor=added / fold['floor']['seconds'][0],
        # The fold does not know the batch, and the plain step grows with it.
        ratio_at_64=1 + added / (plain * PAPER_BATCH / batch_size),
    )


def _ms(seconds: list[float]) -> str:
    return f'{seconds[0] * 1e3:.1f}'


def _times(ratio: list[float]) -> str:
    median, low, high = ratio
    return f'{median:.2f} [{low:.2f}, {high:.2f}]'


def _megabytes(number: int) -> str:
    return f'{number / 1e6:.1f}'


def _print_table(head: str, found: dict[str, dict], columns: dict[str, tuple]) -> None:
    """Prints a line for each entry; a column is a key and how its value is shown."""
    cells = {
        text: [show(entry[key]) for entry in found.values()]
        for text, (key, show) in columns.items()
        if key in found[[*found][0]]
    }
    frame = pd.DataFrame(cells, index=[*found])
    print(frame.rename_axis(columns=head).to_string(), end='\n\n')


def print_tables(result: dict) -> None:
    """Prints the figures of one config as tables."""
    steps, size = result['steps'], result['image_size']
    print(
        f'\n{Path(result["config"]).stem}: {result["batch_size"]} images of '
        f'{size}x{size}, medians over {result["rounds"]} rounds in turn, [quartiles]\n'
    )
    columns = {
        'step (ms)': ('step', _ms),
        'x stock': ('ratio', _times),
        'forward+backward': ('forward_backward', _ms),
        'optimizer phase': ('optimizer', _ms),
    }
    _print_table('training', steps, columns)
    columns = {
        'saved for backward': ('saved_bytes', _megabytes),
        'parameters': ('parameter_bytes', _megabytes),
        'gradients': ('gradient_bytes', _megabytes),
        'optimizer': ('optimizer_bytes', _megabytes),
        'all-reduced': ('all_reduced_bytes', _megabytes),
        'peak of a step': ('peak_memory_bytes', _megabytes),
    }
    _print_table('MB', steps, columns)
    columns = {'ms': ('seconds', _ms), 'x floor': ('ratio', _times)}
    _print_table('all folds, with derivatives', result['fold'], columns)
    print(
        f'Folded training adds {_ms(steps[costs.OREPA]["added"])} ms to the plain '
        f'step: {result["added_over_floor"]:.2f} x the floor. With {PAPER_BATCH} '
        f'images a step, that would be {result["ratio_at_64"]:.3f} x plain.\n'
    )
    columns = {'ms': ('seconds', _ms), 'x plain, folded': ('ratio', _times)}
    _print_table('inference', result['inference'], columns)
    if warning := busy_warning(result['core_share']):
        print(warning)


def plot(results: list[dict], path: Path) -> None:
    """Draws what a step costs over the stock network's, one panel for each budget."""
    titles = dict(ratio='time of a step', saved_bytes='saved for backward')
    titles['all_reduced_bytes'] = 'all-reduced'
    figure, ((*axes,),) = studies.panels(1, len(titles), 10, 4.8)
    labels = [
        f'{Path(r["config"]).stem.split("-orepa")[0]}\n{r["batch_size"]} images'
        for r in results
    ]
    for axis, (key, title) in zip(axes, titles.items()):
        frame = pd.DataFrame(
            [{name: step[key] for name, step in r['steps'].items()} for r in results],
            index=labels,
        )
        if key == 'ratio':
            frame = frame.map(lambda ratio: ratio[0])
        else:
            frame = frame.div(frame[costs.STOCK], axis=0)
        frame.drop(columns=costs.STOCK).plot.bar(
            ax=axis, color=COLOURS, width=0.8, rot=0, legend=False
        )
        for bars in axis.containers:
            axis.bar_label(bars, fmt='%.2f', rotation=90, padding=3)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_title(f'{title}, x stock')
        axis.margins(y=0.18)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4
    )
    studies.save(figure, path)


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
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    figures, chart = args.out / 'train_cost.json', args.out / 'train_cost.png'
    check_outputs([figures, chart], [studies.ROOT / path for path, _ in args.runs])
    configs = {path: load(path) for path, _ in args.runs}
    torch.set_num_threads(args.threads)
    # Without the tables of parameter groups.
    MMLogger.get_instance('train_cost', log_level='WARNING')
    results = []
    with costs.process_group(args.device):
        for path, batch_size in args.runs:
            results.append(measure(path, configs[path], batch_size, args))
            print_tables(results[-1])
    document = dict(machine=machine(args), results=results)
    write_json(document, figures)
    plot(results, chart)
    print(f'\n{document["machine"]}')
    print(f'Figures: {figures}   Chart: {chart}')


if __name__ == '__main__':
    main()
