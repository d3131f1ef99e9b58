"""IDX files as Fashion-MNIST has them, with few images."""

import struct

import numpy as np

NAMES = [
    f'{split}-{kind}-ubyte'
    for split in ('train', 't10k')
    for kind in ('images-idx3', 'labels-idx1')
]


def idx(array):
    """An array as an IDX file of unsigned bytes."""
    header = struct.pack(f'>4B{array.ndim}I', 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def random_arrays(train, test):
    """Images and labels by the name of their file."""
    rng = np.random.default_rng(0)
    counts = (train, train, test, test)
    return {
        name: rng.integers(256, size=(count, 28, 28))
        if 'images' in name
        else rng.integers(10, size=count)
        for name, count in zip(NAMES, counts)
    }
