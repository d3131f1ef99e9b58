"""Writes scikit-learn's handwritten digits for classification, detection, segmentation.

The 1,797 real images (8x8 pixels, ten classes; the test set of the UCI
"Optical Recognition of Handwritten Digits" data) come with scikit-learn, so that
nothing is downloaded. Every fifth image of a class is for validation; scenes for
validation are made of these alone.

    OUT/train/0/0000.png ... OUT/val/9/1795.png          an ImageNet-style folder
    OUT/coco/{train,val}2017/*.png, OUT/coco/annotations  COCO-format scenes
    OUT/cityscapes/{leftImg8bit,gtFine}/{train,val}       Cityscapes-format scenes

OUT/digits.json says that the folders are this tool's, which may replace them.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, '--out data/digits')
    parser.add_argument(
        '--out', type=Path, default=Path('data/digits'), help='the folder to write'
    )
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import cv2
import mmcv
import numpy as np
from sklearn.datasets import load_digits

from mmorepa.cli import one_line_errors
from mmorepa.utils.errors import OutputError
from mmorepa.utils.files import check_outputs, write_json

SPLITS = ('train', 'val')
FOLDERS = (*SPLITS, 'coco', 'cityscapes')
MARKER = 'digits.json'
VAL_EVERY = 5
NUM_SCENES = dict(train=300, val=80)
# Height, width; digits and their sizes in a scene, both ends included.
SCENE = (128, 192)
DIGITS_IN_SCENE = (2, 4)
DIGIT_SIZES = (28, 72)
# Pixels whose ink covers more than this belong to the digit.
INK = 0.4


class Digit(NamedTuple):
    """One handwritten digit."""

    # Its place in scikit-learn's data.
    index: int
    label: int
    # Shape (8, 8), 0 to 1.
    ink: np.ndarray


class Scene(NamedTuple):
    """Several digits on a textured background."""

    # Shape (H, W, 3), uint8, BGR.
    image: np.ndarray
    # Shape (H, W), uint8: 0 is background, 1 + d is digit d.
    labels: np.ndarray
    # (label, x, y, width, height) of each digit.
    boxes: list[tuple[int, int, int, int, int]]


def split_digits() -> dict[str, list[Digit]]:
    """The digits of each split; no image is in both."""
    data, ranks = load_digits(), Counter()
    splits: dict[str, list[Digit]] = {split: [] for split in SPLITS}
    for index, (image, label) in enumerate(zip(data.images, data.target.tolist())):
        ranks[label] += 1
        # 17 grey levels, 0 to 16.
        digit = Digit(index, label, image / 16)
        splits['train' if ranks[label] % VAL_EVERY else 'val'].append(digit)
    return splits


def write_image_folder(splits: dict[str, list[Digit]], out: Path) -> None:
    """Writes OUT/SPLIT/CLASS/INDEX.png."""
    for split, digits in splits.items():
        for digit in digits:
            path = out / split / str(digit.label) / f'{digit.index:04d}.png'
            _write_image(np.round(digit.ink * 255).astype(np.uint8), path)


def make_scene(digits: Sequence[Digit], rng: np.random.Generator) -> Scene:
    """Puts a few digits of varied size and colour on a textured background."""
    height, width = SCENE
    paper = rng.uniform(60, 200, 3)
    image = paper + _texture(rng, cell=32) * 30 + _texture(rng, cell=6) * 14
    labels = np.zeros(SCENE, np.uint8)
    boxes: list[tuple[int, int, int, int, int]] = []
    taken = np.zeros(SCENE, bool)
    for _ in range(rng.integers(*DIGITS_IN_SCENE, endpoint=True)):
        digit = digits[rng.integers(len(digits))]
        size = int(rng.integers(*DIGIT_SIZES, endpoint=True))
        ink = cv2.resize(digit.ink, (size, size), interpolation=cv2.INTER_CUBIC)
        ink = ink.clip(0, 1)
        for _attempt in range(20):
            y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
            place = (slice(y, y + size), slice(x, x + size))
            if not taken[place].any():
                break
        else:
            continue  # No room left for it.
        taken[place] = True
        # Far enough from the paper to be seen, in a colour of its own.
        colour = np.where(paper > 128, rng.uniform(0, 60, 3), rng.uniform(195, 255, 3))
        image[place] += ink[..., None] * (colour - image[place])
        mask = ink > INK
        labels[place][mask] = digit.label + 1
        left, top, *size = cv2.boundingRect(mask.astype(np.uint8))
        boxes.append((digit.label, int(x) + left, int(y) + top, *size))
    return Scene(image.clip(0, 255).astype(np.uint8), labels, boxes)


def make_scenes(
    splits: dict[str, list[Digit]], seed: int
) -> Iterator[tuple[str, int, Scene]]:
    """Yields (split, number, scene)."""
    for i, split in enumerate(SPLITS):
        rng = np.random.default_rng([seed, i])
        for number in range(NUM_SCENES[split]):
            yield split, number, make_scene(splits[split], rng)


def write_coco(splits: dict[str, list[Digit]], out: Path) -> None:
    """Writes OUT/{train,val}2017 and OUT/annotations/instances_*2017.json."""
    categories = [dict(id=label, name=str(label)) for label in range(10)]
    files = {
        split: dict(images=[], annotations=[], categories=categories)
        for split in SPLITS
    }
    height, width = SCENE
    for split, number, scene in make_scenes(splits, seed=0):
        name, file = f'{number:06d}.png', files[split]
        _write_image(scene.image, out / f'{split}2017' / name)
        image = dict(id=number, file_name=name, height=height, width=width)
        file['images'].append(image)
        for label, *box in scene.boxes:
            annotation = dict(id=len(file['annotations']), image_id=number)
            annotation.update(category_id=label, bbox=box, area=box[2] * box[3])
            file['annotations'].append({**annotation, 'iscrowd': 0})
    for split, file in files.items():
        write_json(file, out / 'annotations' / f'instances_{split}2017.json')


def write_cityscapes(splits: dict[str, list[Digit]], out: Path) -> None:
    """Writes OUT/leftImg8bit and OUT/gtFine, label 0 background, 1 + d digit d."""
    for split, number, scene in make_scenes(splits, seed=1):
        name, place = f'digits_{number:06d}_000000', f'{split}/digits'
        image = out / 'leftImg8bit' / place / f'{name}_leftImg8bit.png'
        _write_image(scene.image, image)
        labels = out / 'gtFine' / place / f'{name}_gtFine_labelTrainIds.png'
        _write_image(scene.labels, labels)


def write_all(out: Path) -> dict[str, int]:
    """Writes the data in all formats, and counts the single digits by split.

    What is there is replaced only when the new data are complete.

    Raises:
        OutputError: If a folder is there that this tool has not written, or a link.
    """
    for folder in FOLDERS:
        path = out / folder
        if path.is_symlink() or (path.exists() and not (out / MARKER).exists()):
            raise OutputError(
                f"'{path}' is a link or was not written by this tool (there is no "
                f'{MARKER}), and would be lost; choose another folder'
            )
    check_outputs([out / MARKER])
    splits = split_digits()
    counts = {split: len(digits) for split, digits in splits.items()}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix='.digits-') as temporary:
        write_image_folder(splits, Path(temporary))
        write_coco(splits, Path(temporary, 'coco'))
        write_cityscapes(splits, Path(temporary, 'cityscapes'))
        # Before the folders, so that an interrupted run can be repeated.
        write_json(counts, out / MARKER)
        for folder in FOLDERS:
            shutil.rmtree(out / folder, ignore_errors=True)
            Path(temporary, folder).rename(out / folder)
    return counts


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    counts = write_all(args.out)
    print(
        f'Wrote {counts["train"]} training and {counts["val"]} validation images of '
        f'handwritten digits to {args.out}/train and {args.out}/val,\n'
        f'and scenes of them ({NUM_SCENES["train"]} and {NUM_SCENES["val"]}) to '
        f'{args.out}/coco (boxes) and {args.out}/cityscapes (labelled pixels).'
    )


def _texture(rng: np.random.Generator, cell: int) -> np.ndarray:
    """Smooth noise of about this many pixels a bump, shape (H, W, 1)."""
    height, width = SCENE
    coarse = rng.standard_normal((height // cell + 2, width // cell + 2))
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]


def _write_image(pixels: np.ndarray, path: Path) -> None:
    if not mmcv.imwrite(pixels, str(path)):
        raise OSError(f'cannot write {path}')


if __name__ == '__main__':
    main()
