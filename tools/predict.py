"""Predicts what is in images, and draws it."""

import argparse
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

sys.path.append(str(Path(__file__).resolve().parent))
from start import Parser, add_config_options


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'my_config.py work_dirs/my_config/epoch_30.pth image.jpg')
    parser.add_argument('config', help='the config, of either form')
    parser.add_argument('checkpoint', help='the checkpoint, of either form')
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='images, or folders of images'
    )
    parser.add_argument(
        '--out',
        type=Path,
        help='the folder for the drawn images (default: work_dirs/CONFIG/predictions)',
    )
    parser.add_argument(
        '--score', type=float, default=0.3, help='lowest score of a box (default: 0.3)'
    )
    parser.add_argument(
        '--device', help="where to run, such as 'cpu' (default: a GPU if there is one)"
    )
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import mmcv
from mmengine.fileio import list_dir_or_file
from mmengine.logging import MMLogger

from mmorepa.cli import one_line_errors
from mmorepa.deployment import build_inferencer
from mmorepa.hub import get_config
from mmorepa.utils.files import atomic_write, check_outputs
from mmorepa.utils.tables import counted

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.tif', '.tiff', '.webp')
# The drawn text of a smaller image could not be read.
SHORT_EDGE = 320
MOST = 5


def find_images(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every image, and its name below the folder for what is drawn."""
    for path in paths:
        if os.path.isdir(path):
            names = sorted(list_dir_or_file(path, list_dir=False, recursive=True))
            names = [name for name in names if name.lower().endswith(SUFFIXES)]
            if not names:
                raise FileNotFoundError(
                    f'no image in {path!r}: their names end in {", ".join(SUFFIXES)}'
                )
            yield from ((os.path.join(path, name), name) for name in names)
        elif os.path.isfile(path):
            yield path, os.path.basename(path)
        else:
            raise FileNotFoundError(f'no image at {path!r}')


def predict(inferencer: Any, path: str, folder: str, score: float) -> Any:
    """The prediction for an image, drawn as the only file in a folder."""
    image = mmcv.imread(path) if os.path.getsize(path) else None
    if image is None:
        raise ValueError(f'{path!r} cannot be read as an image')
    if hasattr(inferencer, 'classes'):  # MMPretrain's.
        options = dict(show_dir=folder, resize=max(min(image.shape[:2]), SHORT_EDGE))
    else:
        options = dict(out_dir=folder)
        if 'pred_score_thr' in inferencer.visualize_kwargs:  # MMDetection's.
            options['pred_score_thr'] = score
    # They show a bar for each image.
    with redirect_stdout(io.StringIO()):
        found = inferencer(path, return_datasamples=True, **options)
    if isinstance(found, dict):
        found = found['predictions']
    return found[0] if isinstance(found, list) else found


def describe(sample: Any, classes: Sequence[str], score: float) -> str:
    """A prediction in words, the most certain first."""
    if 'pred_instances' in sample:
        found = sample.pred_instances[sample.pred_instances.scores >= score]
        pairs = zip(found.scores.tolist(), found.labels.tolist())
        found = sorted(pairs, reverse=True)
        texts = [f'{classes[label]} {100 * value:.1f} %' for value, label in found]
        return ': '.join(filter(None, [counted(len(texts), 'object'), _some(texts)]))
    if 'pred_sem_seg' in sample:
        labels = sample.pred_sem_seg.data.flatten().cpu()
        shares = labels.bincount(minlength=len(classes)) / len(labels)
    else:
        shares = sample.pred_score
    best = shares.argsort(descending=True).tolist()
    names = classes or list(map(str, range(len(shares))))
    return _some([f'{names[i]} {100 * shares[i]:.1f} %' for i in best if shares[i] > 0])


def _some(texts: Sequence[str]) -> str:
    return ', '.join(texts[:MOST]) + (', …' if len(texts) > MOST else '')


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    images = list(find_images(args.images))
    out = args.out or Path('work_dirs', Path(args.config).stem, 'predictions')
    check_outputs([out / name for _, name in images], [path for path, _ in images])
    cfg = get_config(args.config, args.cfg_options)
    inferencer = build_inferencer(cfg, args.checkpoint, args.device)
    if hasattr(inferencer, 'classes'):
        classes = inferencer.classes
    else:
        classes = inferencer.model.dataset_meta['classes']
    for path, name in images:
        with tempfile.TemporaryDirectory() as folder:
            sample = predict(inferencer, path, folder, args.score)
            (drawn,) = (file for file in Path(folder).rglob('*') if file.is_file())
            with atomic_write(out / name) as file:
                mmcv.imwrite(mmcv.imread(str(drawn)), str(file))
        print(f'{path}: {describe(sample, classes, args.score)}', flush=True)
    print(f'Wrote {counted(len(images), "image")} to {out}.')


if __name__ == '__main__':
    # What libraries advise their developers.
    warnings.filterwarnings('ignore', module='mm(cv|det|engine|pretrain|seg)')
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    main()
