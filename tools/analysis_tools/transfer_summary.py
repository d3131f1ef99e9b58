"""Adds what `tools/quickstart.sh transfer` has measured to the quickstart's summary."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from mmorepa.cli import one_line_errors
from mmorepa.utils.files import atomic_write, check_outputs
from mmorepa.utils.tables import format_table

# Task: its name in the summary, its name for people, what the metric calls it, and
# what one is: mmseg counts in per cent.
TASKS = {
    'det': ('det_ap', 'box AP (0.5:0.95)', 'coco/bbox_mAP', 1.0),
    'seg': ('seg_miou', 'mIoU', 'mIoU', 100.0),
}
FORMS = ('', '_deploy')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Adds the transfer's results to the quickstart's summary."
    )
    parser.add_argument('work_dir', type=Path, help='the folder of the quickstart')
    for task in TASKS:
        parser.add_argument(f'--{task}-seconds', type=int, required=True)
    return parser.parse_args(argv)


def summarize(work_dir: Path) -> dict:
    """Collects the figures from the files that the tools have written."""
    figures = {}
    for task, (key, _, metric, unit) in TASKS.items():
        for form in FORMS:
            path = work_dir / task / f'test{form}.json'
            figures[f'{key}{form}'] = json.loads(path.read_text())[metric] / unit
    return figures


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    target = args.work_dir / 'summary.json'
    inputs = [args.work_dir / task / f'test{f}.json' for task in TASKS for f in FORMS]
    check_outputs([target], inputs)
    figures = summarize(args.work_dir)
    seconds = {f'{task}_seconds': getattr(args, f'{task}_seconds') for task in TASKS}
    summary = {**json.loads(target.read_text()), **figures, **seconds}
    with atomic_write(target) as file:
        file.write_text(json.dumps(summary, indent=2) + '\n')
    rows = [
        (
            name,
            f'{figures[key]:.4f}',
            f'{figures[f"{key}_deploy"]:.4f}',
            f'{seconds[f"{task}_seconds"]}',
        )
        for task, (key, name, _, _) in TASKS.items()
    ]
    print(format_table(('', 'training form', 'deployed', 'seconds'), rows))
    for key, value in figures.items():
        print(f'{key}: {value:.4f}')
    print(f'Figures: {target}')


if __name__ == '__main__':
    main()
