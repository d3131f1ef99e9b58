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
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parents[1]))
from start import Parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
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

FILES = [
    f'{split}-{kind}-ubyte'
    for split in ('train', 't10k')
    for kind in ('images-idx3', 'labels-idx1')
]


def read_idx(folder: Path, name: str) -> tuple[bytes, np.ndarray]:
    """One of the files, uncompressed, and what is in it.

    It is in the folder under its name, or with ``.gz`` behind it.
    """
    path = folder / name
    if not path.is_file():
        path = folder / f'{name}.gz'
    if not path.is_file():
        raise FileNotFoundError(
            f"no {name} or {name}.gz in '{folder}'; the folder needs {', '.join(FILES)}"
        )
    data, shape = path.read_bytes(), (28, 28) if 'images' in name else ()
    try:
        data = gzip.decompress(data) if path.suffix == '.gz' else data
        array = np.frombuffer(data, np.uint8, offset=8 + 4 * len(shape))
        array = array.reshape(-1, *shape)
        # Unsigned bytes of so many dimensions, and these.
        header = struct.pack(f'>4B{array.ndim}I', 0, 0, 8, array.ndim, *array.shape)
        if not data.startswith(header):
            raise ValueError(f'it begins {data[:16]!r}, not {header!r}')
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"'{path}' is not a whole IDX file: {error}") from error
    return data, array


def convert(folder: Path, out: Path) -> list[int]:
    """Writes the four files; none of them before all are read and checked.

    Returns the numbers of images for training and testing.
    """
    files = {name: read_idx(folder, name) for name in FILES}
    arrays = [array for _, array in files.values()]
    for images, labels in (arrays[:2], arrays[2:]):
        if len(images) != len(labels) or labels.max(initial=0) > 9:
            raise ValueError(
                f"in '{folder}' there are {len(images)} images with {len(labels)} "
                f'labels up to {labels.max(initial=0)}; they go from 0 to 9'
            )
    # It may be the folder that was read: what is written then is the same.
    check_outputs(out / name for name in files)
    for name, (data, _) in files.items():
        with atomic_write(out / name) as file:
            file.write_bytes(data)
    return [len(arrays[0]), len(arrays[2])]


@one_line_errors()
def main(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    train, test = convert(args.folder, args.out)
    print(f'Wrote {train} training and {test} test images to {args.out}.')


if __name__ == '__main__':
    main()
