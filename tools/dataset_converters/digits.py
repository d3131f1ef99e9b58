"""Writes scikit-learn's handwritten digits as an image folder.

The 1,797 real images (8x8 pixels, ten classes; the test set of the UCI
"Optical Recognition of Handwritten Digits" data) come with scikit-learn, so that
nothing is downloaded. Every fifth image of a class is for validation:

    OUT/train/0/0000.png ... OUT/val/9/1795.png

OUT/digits.json says that the folders are this tool's, which may replace them.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import mmcv
import numpy as np
from sklearn.datasets import load_digits

FOLDERS = ('train', 'val')
MARKER = 'digits.json'
VAL_EVERY = 5


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Writes scikit-learn's handwritten digits as an image folder."
    )
    parser.add_argument(
        '--out', type=Path, default=Path('data/digits'), help='the folder to write'
    )
    return parser.parse_args(argv)


def split_of(rank: int) -> str:
    """The split of the ``rank``-th image of its class."""
    return 'val' if rank % VAL_EVERY == VAL_EVERY - 1 else 'train'


def write_image_folder(out: Path) -> dict:
    """Writes the classification data, replacing what is there.

    Args:
        out (Path): The folder; ``train`` and ``val`` in it are replaced only when
            the new ones are complete.

    Returns:
        dict: Images by split.

    Raises:
        FileExistsError: If a folder is there that this tool has not written.
    """
    foreign = [f for f in FOLDERS if (out / f).exists()]
    if foreign and not (out / MARKER).exists():
        raise FileExistsError(
            f"'{out / foreign[0]}' is there and was not written by this tool (there "
            f'is no {MARKER}); choose another folder'
        )
    digits = load_digits()
    counts = dict.fromkeys(FOLDERS, 0)
    ranks = dict.fromkeys(range(10), 0)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix='.digits-') as temporary:
        for index, (image, label) in enumerate(zip(digits.images, digits.target)):
            split = split_of(ranks[int(label)])
            ranks[int(label)] += 1
            counts[split] += 1
            # 17 grey levels, 0 to 16.
            pixels = np.round(image * 255 / 16).astype(np.uint8)
            path = Path(temporary, split, str(label), f'{index:04d}.png')
            if not mmcv.imwrite(pixels, str(path)):
                raise OSError(f'cannot write {path}')
        # Before the folders, so that an interrupted run can be repeated.
        (out / MARKER).write_text(json.dumps(counts) + '\n')
        for folder in FOLDERS:
            shutil.rmtree(out / folder, ignore_errors=True)
            Path(temporary, folder).rename(out / folder)
    return counts


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    try:
        counts = write_image_folder(args.out)
    except OSError as error:
        sys.exit(f'error: {error}')
    print(
        f'Wrote {counts["train"]} training and {counts["val"]} validation images of '
        f'handwritten digits to {args.out}/train and {args.out}/val.'
    )


if __name__ == '__main__':
    main()
