"""Random numbers that depend on the seed and the progress of a training alone."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A seed below 2³² for each key, unrelated to those of its neighbours."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and PyTorch's CPU, then puts them back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # And no GPU's, which would stay so.
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class SeededBatches:
    """A batch sampler whose batches bring along the seed of their augmentation.

    It depends on the batch's number in the whole training, and on no worker.

    Args:
        batches (Iterable): A batch sampler of indices.
        *key (int): The rest of the seed: that of the run, the rank.
    """

    def __init__(self, batches: Iterable[list], *key: int) -> None:
        self.batches = batches
        self.key = key
        self.number = 0  # Of the batch to come.
        self.first = 0  # Those before are left out, and not loaded.

    def __iter__(self) -> Iterator['_SeededBatch']:
        for indices in self.batches:
            number = self.number
            self.number += 1
            if number >= self.first:
                yield _SeededBatch(indices, seed_of(*self.key, number))

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':  # Not there while a copy is made.
            raise AttributeError(name)
        return getattr(self.batches, name)


class _SeededBatch:
    """The indices of a batch; iterating over them seeds the generators."""

    def __init__(self, indices: list, seed: int) -> None:
        self.indices = indices
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        with seeded(self.seed):
            yield from self.indices

    def __len__(self) -> int:
        return len(self.indices)
