"""Trains, tests, deploys and tests again, on handwritten digits that need no download.

Everything is written below the working directory: the digits to data/digits, the rest
to work_dirs/quickstart. ``transfer`` goes on from it: it fine-tunes a detector and a
segmenter with that backbone, and deploys them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parent))
from start import Parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, '')
    parser.add_argument(
        'part',
        nargs='?',
        choices=['transfer'],
        help='go on from it: fine-tune a detector and a segmenter, and deploy them',
    )
    parser.add_argument(
        '--epochs', type=int, default=20, help='of the pretraining (default: 20)'
    )
    parser.add_argument(
        '--seconds-before',
        type=int,
        default=0,
        help='what the set-up took, for the summary',
    )
    return parser.parse_args(argv)


TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / 'configs' / 'digits'
CONFIG = CONFIGS / 'resnet18-slim-orepa_1xb64_digits.py'
PLAIN_CONFIG = CONFIGS / 'resnet18-slim_1xb64_digits.py'
# What each is, its config, its name in the summary, the name of its metric for people
# and for its toolbox, and what one is: mmseg counts in per cent.
TASKS = {
    'det': (
        'Faster R-CNN',
        CONFIGS / 'faster-rcnn_r18-slim-orepa_fpn_1xb2-10e_digits.py',
        *('det_ap', 'box AP (0.5:0.95)', 'coco/bbox_mAP', 1),
    ),
    'seg': (
        'DeepLabV3+',
        CONFIGS / 'deeplabv3plus_r18-slim-orepa-d8_1xb8-2500_digits.py',
        *('seg_miou', 'mIoU', 'mIoU', 100),
    ),
}
WORK = Path('work_dirs/quickstart')
SUMMARY = WORK / 'summary.json'
# What the branches do, at the end of each epoch of 23 steps.
WATCHED = (
    'default_hooks.branch_statistics.type=BranchStatisticsHook',
    'default_hooks.branch_statistics.interval=23',
)


def step(text: str) -> None:
    print(f'\n==> {text}', flush=True)


def run(tool: str, *arguments: object) -> None:
    """Runs a tool; if it fails, this process ends with its exit status."""
    line = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    if status := subprocess.call(line):
        print(f'quickstart: this failed: {" ".join(line)}', file=sys.stderr)
        sys.exit(status)


def train(config: Path, folder: Path, *options: str) -> int:
    """Trains in ``FOLDER/train``; the seconds it took."""
    started = time.monotonic()
    # A run that is broken off must not leave the results of an older one behind.
    shutil.rmtree(folder / 'train', ignore_errors=True)
    run('train.py', config, '--work-dir', folder / 'train', '--cfg-options', *options)
    return round(time.monotonic() - started)


def test(config: Path, checkpoint: Path, folder: Path, form: str) -> None:
    """Tests one form; the metrics go to ``FOLDER/FORM.json``."""
    out = ('--out', folder / f'{form}.json', '--out-item', 'metrics')
    run('test.py', config, checkpoint, '--work-dir', folder / 'test', *out)


def deploy(config: Path, checkpoint: Path, folder: Path) -> None:
    """Tests a checkpoint, switches it to its plain form, and tests that."""
    step('Testing the training form')
    test(config, checkpoint, folder, 'test')
    step('Switching to the deployed form')
    tool, deployed = 'model_converters/switch_to_deploy.py', folder / 'deploy.pth'
    run(tool, config, checkpoint, deployed, '--json', folder / 'switch.json')
    step('Testing the deployed form')
    # The config that was written beside it builds that form.
    test(folder / 'deploy_config.py', deployed, folder, 'test_deploy')


def pretrain(epochs: int, seconds_before: int) -> None:
    started = time.monotonic()
    step('Data: handwritten digits')
    SUMMARY.unlink(missing_ok=True)
    run('dataset_converters/digits.py')
    seconds, length = {}, f'train_cfg.max_epochs={epochs}'
    for name, config, folder, options in (
        ('plain', PLAIN_CONFIG, WORK / 'plain', ()),
        ('OREPA', CONFIG, WORK, WATCHED),
    ):
        step(f'Training a slim {name} ResNet-18 for {epochs} epochs (20: a minute)')
        seconds[name] = train(config, folder, length, *options)
        deploy(config, pretrained(epochs, folder), folder)
    step('Summary')
    run(
        *('analysis_tools/quickstart_summary.py', WORK, CONFIG, pretrained(epochs)),
        *('--seconds', seconds_before + round(time.monotonic() - started)),
        *('--training-seconds', seconds['OREPA']),
        *('--plain-training-seconds', seconds['plain']),
    )


def pretrained(epochs: int, folder: Path = WORK) -> Path:
    return folder / 'train' / f'epoch_{epochs}.pth'


def fine_tune(config: Path, backbone: Path, folder: Path) -> int:
    """Trains, tests, deploys and draws, all in the folder; the seconds it took."""
    started = time.monotonic()
    start = f'model.backbone.init_cfg.checkpoint={backbone.as_posix()}'
    train(config, folder, start)
    checkpoint = Path((folder / 'train' / 'last_checkpoint').read_text())
    deploy(config, checkpoint, folder)
    files = (checkpoint, folder / 'deploy.pth', folder / 'predictions.png')
    run('analysis_tools/draw_predictions.py', config, *files)
    return round(time.monotonic() - started)


def transfer(backbone: Path) -> None:
    run('dataset_converters/digits.py')
    seconds = {}
    for task, (name, config, *_) in TASKS.items():
        step(f'Fine-tuning a {name} on scenes of several digits (minutes)')
        seconds[task] = fine_tune(config, backbone, WORK / task)
    step('Summary')
    summarize_transfer(seconds)


def summarize_transfer(seconds: dict[str, int]) -> None:
    """Prints the metrics of both forms, and adds them to the summary."""
    summary = json.loads(SUMMARY.read_text())
    print(f'{"":18}{"training form":>14}{"deployed":>10}{"seconds":>9}')
    for task, (_, _, key, text, metric, unit) in TASKS.items():
        before, after = (
            json.loads((WORK / task / f'{form}.json').read_text())[metric] / unit
            for form in ('test', 'test_deploy')
        )
        summary.update({key: before, f'{key}_deploy': after})
        summary[f'{task}_seconds'] = seconds[task]
        print(f'{text:18}{before:14.4f}{after:10.4f}{seconds[task]:9}')
    SUMMARY.write_text(json.dumps(summary, indent=2) + '\n')
    print(f'Figures: {SUMMARY}')


def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    backbone = pretrained(args.epochs)
    if args.part == 'transfer' and find_spec('mmcv._ext') is None:
        sys.exit(
            'error: detection needs mmcv with its compiled operators, which are not '
            'in this environment; in a clone, bash tools/setup_env.sh --ops compiles '
            'them'
        )
    if args.part != 'transfer' or not (backbone.is_file() and SUMMARY.is_file()):
        pretrain(args.epochs, args.seconds_before)
    if args.part == 'transfer':
        transfer(backbone)


if __name__ == '__main__':
    main()
