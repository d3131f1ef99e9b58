"""Times functions in turn, so that all of them meet the same machine."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Clock:
    """Reads the time of a device, in seconds."""

    def __init__(self, device: str) -> None:
        self.is_cuda = torch.device(device).type == 'cuda'

    def now(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, function: Callable[[], object]) -> float:
        start = self.now()
        function()
        return self.now() - start


def in_turn(
    functions: dict[str, Callable[[], Sequence[float]]], rounds: int, what: str
) -> dict[str, list[tuple[float, ...]]]:
    """Calls all functions once in each round, and returns what they measured.

    Every round begins with another one; two rounds before are not counted.
    """
    names = list(functions)
    measured: dict[str, list] = {name: [] for name in names}
    for index in range(-2, rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            result = functions[name]()
            if index >= 0:
                measured[name].append(tuple(result))
        say(f'{what}: round {max(index + 1, 0)} of {rounds}')
    sys.stderr.write('\n')
    return measured


def say(text: str) -> None:
    end = '' if sys.stderr.isatty() else '\n'
    sys.stderr.write(f'\r{text}{end}')
    sys.stderr.flush()


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)

    def __format__(self, spec: str) -> str:
        low, high = format(self.low, spec), format(self.high, spec)
        return f'{format(self.median, spec)} [{low}, {high}]'


def ratios(measured: Sequence[float], reference: Sequence[float]) -> Spread:
    """Ratios within each round, since a machine's speed changes between rounds."""
    return Spread.of([a / b for a, b in zip(measured, reference)])


def measure_seconds(
    functions: dict[str, Callable[[], object]],
    reference: str,
    rounds: int,
    what: str,
    clock: Clock,
    before: Callable[[], object] = lambda: None,
) -> dict[str, dict]:
    """Seconds of each function, in turn, and over those of ``reference``.

    ``before`` is called before each, and not counted.
    """

    def timed(function: Callable[[], object]) -> Callable[[], tuple[float]]:
        def measure() -> tuple[float]:
            before()
            return (clock.seconds(function),)

        return measure

    measured = in_turn({n: timed(f) for n, f in functions.items()}, rounds, what)
    seconds = {name: [t for (t,) in times] for name, times in measured.items()}
    return {
        name: dict(
            seconds=Spread.of(seconds[name]),
            ratio=ratios(seconds[name], seconds[reference]),
        )
        for name in functions
    }
