"""Writes Fashion-MNIST where MMPretrain's FashionMNIST class finds it.

The class wants four uncompressed IDX files in one folder, and downloads them where they
are not there. This takes them from a folder instead, compressed or not: the originals,
or those of Debian's package dataset-fashion-mnist, which are compressed anew and so do
not have the checksums that the download asks for:

    apt-get download dataset-fashion-mnist   # needs no root, and nor does dpkg -x
    dpkg -x dataset-fashion-mnist_*.deb debian
    python tools/dataset_converters/fashion_mnist.py \\
        debian/usr/share/datasets/fashion-mnist
"""

import argparse
import gzip
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, 'debian/usr/share/datasets/fashion-mnist')
    parser.add_argument('folder', type=Path, help='has the four files, .gz or not')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('data/fashion_mnist'),
        help='the folder to write (default: data/fashion_mnist)',
    )
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

import numpy as np

from mmorepa.cli import one_line_errors
from mmorepa.utils.files import atomic_write, check_outputs

# The images of each split, and their labels.
PAIRS = (
    ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte'),
    ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'),
)
# Of the header of an IDX file: unsigned bytes.
UBYTE = 0x08
SIDE = 28
NUM_CLASSES = 10


def read_idx(folder: Path, name: str) -> tuple[bytes, np.ndarray]:
    """An IDX file of unsigned bytes, uncompressed, and what is in it.

    It is in the folder under its name, or with ``.gz`` behind it.
    """
    path = folder / name
    if not path.is_file():
        path = folder / f'{name}.gz'
    if not path.is_file():
        raise FileNotFoundError(
            f"no {name} or {name}.gz in '{folder}'; the folder needs "
            f'{", ".join(name for pair in PAIRS for name in pair)}'
        )
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == '.gz' else data
        zeros, kind, dimensions = struct.unpack_from('>HBB', data)
        shape = struct.unpack_from(f'>{dimensions}I', data, 4)
        array = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (EOFError, OSError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"'{path}' is not a whole IDX file: {error}") from error
    if (zeros, kind) != (0, UBYTE):
        raise ValueError(f"'{path}' is no IDX file of bytes: it begins {data[:4]!r}")
    return data, array


def check_pair(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> int:
    """The number of images of a split; raises an error if its files do not fit."""
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1]:
        raise ValueError(
            f'{names[0]} has the shape {images.shape} and {names[1]} {labels.shape}, '
            f'not (N, {SIDE}, {SIDE}) and (N,)'
        )
    if labels.max(initial=0) >= NUM_CLASSES:
        raise ValueError(f'{names[1]} has a label {labels.max()}; classes are 0 to 9')
    return len(images)


def convert(folder: Path, out: Path) -> list[int]:
    """Writes the four files; none of them before all are read and checked.

    Returns the numbers of images for training and testing.
    """
    files = {name: read_idx(folder, name) for pair in PAIRS for name in pair}
    counts = [check_pair(*(files[name][1] for name in pair), pair) for pair in PAIRS]
    # It may be the folder that was read: what is written then is the same.
    check_outputs(out / name for name in files)
    for name, (data, _) in files.items():
        with atomic_write(out / name) as file:
            file.write_bytes(data)
    return counts


@one_line_errors()
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    train, test = convert(args.folder, args.out)
    print(f'Wrote {train} training and {test} test images to {args.out}.')


if __name__ == '__main__':
    main()
