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
import math
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


def read_idx(folder: Path, name: str) -> bytes:
    """An IDX file, uncompressed.

    Args:
        folder (Path): Where it is, under its name or with ``.gz`` behind it.
        name (str): Its name without ``.gz``.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it cannot be uncompressed.
    """
    if (folder / name).is_file():
        return (folder / name).read_bytes()
    path = folder / f'{name}.gz'
    if not path.is_file():
        raise FileNotFoundError(
            f"no {name} or {name}.gz in '{folder}'; the folder needs "
            f'{", ".join(name for pair in PAIRS for name in pair)}'
        )
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"'{path}' is not a whole gzip file: {error}") from error


def shape_of(data: bytes, name: str) -> tuple[int, ...]:
    """The shape that the header of an IDX file of bytes gives.

    Args:
        data (bytes): The file.
        name (str): Its name, for errors.

    Returns:
        tuple[int, ...]: One size for labels, three for images.

    Raises:
        ValueError: If this is no IDX file of unsigned bytes, or not a whole one.
    """
    if len(data) < 4 or data[:3] != bytes([0, 0, UBYTE]) or len(data) < 4 * data[3] + 4:
        raise ValueError(f'{name} is no IDX file of bytes: it begins with {data[:4]!r}')
    shape = struct.unpack_from(f'>{data[3]}I', data, 4)
    found = len(data) - 4 * data[3] - 4
    if found != math.prod(shape):
        raise ValueError(
            f'{name} is not whole: its header says {math.prod(shape)} bytes of data '
            f'(shape {shape}), found {found}'
        )
    return shape


def check_pair(images: bytes, labels: bytes, names: tuple[str, str]) -> int:
    """The number of images of a split whose files fit together.

    Raises:
        ValueError: If they do not.
    """
    shape, count = shape_of(images, names[0]), shape_of(labels, names[1])
    if len(shape) != 3 or shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f'{names[0]} has the shape {shape}, not that of images of {SIDE}x{SIDE}'
        )
    if count != shape[:1]:
        raise ValueError(f'{names[1]} is of {count}, and there are {shape[0]} images')
    largest = max(labels[8:], default=0)
    if largest >= NUM_CLASSES:
        raise ValueError(f'{names[1]} has a label {largest}; the classes are 0 to 9')
    return shape[0]


def convert(folder: Path, out: Path) -> list[int]:
    """Writes the four files; none of them before all are read and checked.

    Args:
        folder (Path): Where they are.
        out (Path): Where to write them. It may be the same.

    Returns:
        list[int]: The numbers of images for training and testing.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged, or does not fit the others.
    """
    files = {name: read_idx(folder, name) for pair in PAIRS for name in pair}
    counts = [check_pair(files[pair[0]], files[pair[1]], pair) for pair in PAIRS]
    # It may be the folder that was read: what is written then is the same.
    check_outputs(out / name for name in files)
    for name, data in files.items():
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
