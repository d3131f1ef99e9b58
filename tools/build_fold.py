"""Compiles OREPA's folds for this CPU, once, in about 30 seconds; prints where it is.

Training on a CPU is faster with them, and the same without.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Optional

sys.path.append(str(Path(__file__).resolve().parent))
from start import Parser


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    return Parser(__doc__, '').parse_args(argv)


if __name__ == '__main__':
    parse_args()  # Before the seconds that the rest takes.

from build_mmcv import search_path

from mmorepa.functional import compiled


def main(argv: Optional[list[str]] = None) -> None:
    parse_args(argv)
    os.environ['PATH'] = search_path()
    # It warns of a missing CUDA, which is not needed.
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)
    try:
        path = compiled.build()
    except RuntimeError as error:
        sys.exit(f'build_fold: {error}')
    print(path)


if __name__ == '__main__':
    main()
