"""Tables and a chart of the figures of :mod:`train_cost`."""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from step_costs import OREPA, STOCK

from mmorepa.analysis.timing import Spread, busy_warning
from mmorepa.utils.files import atomic_write
from mmorepa.utils.tables import format_table

MEGABYTE = 1e6
# The batch of the paper, for each GPU.
PAPER_BATCH = 64
# Okabe and Ito's, as in tools/analysis_tools/charts.py.
COLOURS = {
    'plain, default layout': '#999999',
    'plain': '#000000',
    'DBB': '#E69F00',
    'OREPA, naive': '#CC79A7',
    'OREPA, online': '#56B4E9',
    'OREPA, folded, default layout': '#009E73',
    'OREPA, folded': '#0072B2',
}


def print_tables(result: dict) -> None:
    """Prints the figures of one config as tables."""
    steps, fold = result['steps'], result['fold']

    def ms(spread: Spread) -> str:
        return f'{spread.median * 1e3:.1f}'

    def mb(value: int) -> str:
        return f'{value / MEGABYTE:.1f}'

    print(
        f'\n{Path(result["config"]).stem}: {result["batch_size"]} images of '
        f'{result["image_size"]}x{result["image_size"]}, medians over '
        f'{result["rounds"]} rounds in turn, [quartiles]\n'
    )
    rows = [
        (
            name,
            ms(r['step']),
            f'{r["ratio"]:.2f}',
            ms(r['forward_backward']),
            ms(r['optimizer']),
        )
        for name, r in steps.items()
    ]
    head = ('training', 'step (ms)', 'x stock', 'forward+backward', 'optimizer phase')
    print(format_table(head, rows))
    columns = {
        'saved_bytes': 'saved for backward',
        'parameter_bytes': 'parameters',
        'gradient_bytes': 'gradients',
        'optimizer_bytes': 'optimizer',
        'all_reduced_bytes': 'all-reduced',
        'peak_memory_bytes': 'peak of a step',
    }
    columns = {k: title for k, title in columns.items() if k in steps[STOCK]}
    rows = [(n, *(mb(r[key]) for key in columns)) for n, r in steps.items()]
    print()
    print(format_table(('MB', *columns.values()), rows))
    print()
    rows = [(n, str(r['operations']), str(r['host_reads'])) for n, r in steps.items()]
    head = ('a step without compiled folds', 'operations, views apart', 'host reads')
    print(format_table(head, rows))
    print()
    rows = [(n, ms(r['seconds']), f'{r["ratio"]:.2f}') for n, r in fold.items()]
    print(format_table(('all folds, with derivatives', 'ms', 'x floor'), rows))
    parts = ', '.join(f'{n} {part:.0%}' for n, part in fold['folded']['parts'].items())
    print(f'What folded training spends on it: {parts}.')
    added = steps[OREPA]['added']
    print(
        f'Folded training adds {added.median * 1e3:.1f} ms to the plain step: '
        f'{result["added_over_floor"]:.2f} x the floor. With {PAPER_BATCH} images a '
        f'step, that would be {result["ratio_at_64"]:.3f} x plain.\n'
    )
    rows = [
        (n, str(r['groups']), ms(r['seconds'])) for n, r in result['optimizers'].items()
    ]
    print(format_table(('SGD on OREPA', 'groups', 'ms'), rows))
    print()
    rows = [
        (n, ms(r['seconds']), f'{r["ratio"]:.2f}')
        for n, r in result['inference'].items()
    ]
    print(format_table(('inference', 'ms', 'x plain, folded'), rows))
    if warning := busy_warning(result['core_share']):
        print(f'\n{warning}')


def plot(results: list[dict], path: Path) -> None:
    """Draws what a step costs over the stock network's, one panel for each budget."""
    panels = {
        'time of a step': lambda r, stock: r['ratio'].median,
        'saved for backward': lambda r, stock: r['saved_bytes'] / stock['saved_bytes'],
        'all-reduced': lambda r, stock: (
            r['all_reduced_bytes'] / stock['all_reduced_bytes']
        ),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.8), layout='constrained')
    width = 0.8 / len(COLOURS)
    for axis, (title, value) in zip(axes, panels.items()):
        for index, (name, colour) in enumerate(COLOURS.items()):
            heights = [value(r['steps'][name], r['steps'][STOCK]) for r in results]
            places = [
                n + (index - (len(COLOURS) - 1) / 2) * width
                for n in range(len(results))
            ]
            bars = axis.bar(places, heights, width * 0.92, label=name, color=colour)
            axis.bar_label(bars, fmt='%.2f', rotation=90, padding=3)
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_title(f'{title}, x stock')
        axis.set_xticks(
            range(len(results)),
            [
                f'{Path(r["config"]).stem.split("-orepa")[0]}\n{r["batch_size"]} images'
                for r in results
            ],
        )
        axis.margins(y=0.18)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4
    )
    with atomic_write(path) as file:
        figure.savefig(file, dpi=130, format='png')
    plt.close(figure)
