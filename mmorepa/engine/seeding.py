"""Random numbers that depend only on the seed and the progress of a training."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


def seed_of(*key: int) -> int:
    """A seed below 2³² for a key; the seeds of similar keys are unrelated."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class SeededBatches:
    """A batch sampler whose batches contain the seed of their augmentation.

    The seed depends on the number of the batch in the whole training, and not on the
    worker that loads it.

    Args:
        batches (Sampler): A batch sampler of indices.
        *key (int): The rest of the key of the seed: the seed of the run, and the rank.
    """

    def __init__(self, batches: Sampler, *key: int) -> None:
        vars(self).update(vars(batches))  # MMEngine reads its sampler, for example.
        self.batches = batches
        self.key = key
        self.number = 0  # The number of the next batch.
        self.first = 0  # Batches with lower numbers are skipped and not loaded.

    def __iter__(self) -> Iterator['_SeededBatch']:
        for indices in self.batches:
            number = self.number
            self.number += 1
            if number >= self.first:
                yield _SeededBatch(indices, seed_of(*self.key, number))

    def __len__(self) -> int:
        return len(self.batches)


class _SeededBatch:
    """The indices of a batch; an iteration over them seeds the generators first."""

    def __init__(self, indices: list, seed: int) -> None:
        self.indices = indices
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        random.seed(self.seed)
        np.random.seed(self.seed)
        # Not torch.manual_seed(), which would also seed the GPUs.
        torch.default_generator.manual_seed(self.seed)
        yield from self.indices

    def __len__(self) -> int:
        return len(self.indices)
