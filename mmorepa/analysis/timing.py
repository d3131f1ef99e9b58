"""Times functions in turn, so that other programs disturb all of them alike."""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

T = TypeVar('T')
# On a busy machine, a short function runs undisturbed in one of many rounds.
ROUNDS, SECONDS = 15, 2.0
# A machine with at least this share of the cores is calm; 0.95 is usual without load.
CALM = 0.8


class Clock:
    """Reads the time of a device in seconds, and measures the share of the cores."""

    def __init__(self, device: str = 'cpu') -> None:
        self.is_cuda = torch.device(device).type == 'cuda'
        self._numbers = torch.ones(torch.get_num_threads() << 19)
        self._used = self._given = 0.0

    def now(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, function: Callable[[], object]) -> float:
        start = self.now()
        function()
        return self.now() - start

    def look_around(self) -> None:
        """Runs all threads for some milliseconds, without waiting for each other.

        On a calm machine, each thread has a core all the time.
        """
        start, used = time.perf_counter(), time.process_time()
        self._numbers.digamma()
        self._used += time.process_time() - used
        self._given += (time.perf_counter() - start) * torch.get_num_threads()

    @property
    def core_share(self) -> float:
        """The fraction of the time in which the threads of this process had a core."""
        return min(1.0, self._used / self._given)


def busy_warning(core_share: float) -> str:
    """A warning of two lines about figures of a busy machine, or ''."""
    if core_share >= CALM:
        return ''
    return (
        'The machine was busy: the threads of this process had a core for '
        f'{core_share:.0%} of the time.\nThe figures may be much too high; measure '
        'again when no other program runs.'
    )


def in_turn(
    functions: dict[str, Callable[[], T]],
    clock: Clock,
    rounds: int,
    seconds: float = 0.0,
    what: str = '',
) -> dict[str, list[T]]:
    """Calls all functions once in each round, and returns their results by name.

    There are at least so many rounds, and more while the seconds last. Each round
    begins with another function. Two rounds come before and are not counted. The clock
    looks around after each round. ``what`` names the measurement in a line of progress.
    """
    names = list(functions)
    results: dict[str, list[T]] = {name: [] for name in names}
    end = clock.now() + seconds
    for index in itertools.count(-2):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            result = functions[name]()
            if index >= 0:
                results[name].append(result)
        clock.look_around()
        if what:
            progress = f'{what}: round {max(index + 1, 0)} of {rounds}'
            print(progress, end='\r', file=sys.stderr, flush=True)
        if index + 1 >= rounds and clock.now() >= end:
            break
    if what:
        print(file=sys.stderr)
    return results


def least_seconds(
    functions: Sequence[Callable[[], object]],
) -> tuple[list[float], float]:
    """The least seconds of each function over many rounds, and the share of the cores.

    Other programs only lengthen a call, so the least is nearest to a calm machine's.
    """
    clock = Clock()
    timed = {str(i): partial(clock.seconds, f) for i, f in enumerate(functions)}
    seconds = in_turn(timed, clock, ROUNDS, SECONDS)
    return [min(times) for times in seconds.values()], clock.core_share
