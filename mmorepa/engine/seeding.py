"""Random numbers that depend on the seed and the progress of a training alone."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


def seed_of(*key: int) -> int:
    """A seed below 2³² for each key, unrelated to those of its neighbours."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class SeededBatches:
    """A batch sampler whose batches bring along the seed of their augmentation.

    It depends on the batch's number in the whole training, and on no worker.

    Args:
        batches (Sampler): A batch sampler of indices.
        *key (int): The rest of the seed: that of the run, the rank.
    """

    def __init__(self, batches: Sampler, *key: int) -> None:
        vars(self).update(vars(batches))  # Others look for its sampler, for one.
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


class _SeededBatch:
    """The indices of a batch; whoever iterates over them is seeded."""

    def __init__(self, indices: list, seed: int) -> None:
        self.indices = indices
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.default_generator.manual_seed(self.seed)  # No image is made on a GPU.
        yield from self.indices

    def __len__(self) -> int:
        return len(self.indices)
