import pytest
import torch

from mmorepa.analysis import timing
from mmorepa.analysis.timing import Clock, busy_warning, in_turn, least_seconds


class Machine:
    """In the place of ``time``: its clocks run as they are told."""

    def __init__(self):
        self.now = self.used = 0.0

    def run(self, seconds, core_share=1.0):
        self.now += seconds
        self.used += seconds * core_share * torch.get_num_threads()

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.used


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(timing, 'time', machine)
    monkeypatch.setattr(torch.Tensor, 'digamma', lambda _: machine.run(0.004))
    return machine


def test_every_round_has_all_and_begins_with_another(machine):
    calls = []
    functions = {name: lambda n=name: calls.append(n) or len(calls) for name in 'abc'}
    results = in_turn(functions, Clock(), rounds=3)
    rounds = [''.join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ['bca', 'cab', 'abc', 'bca', 'cab']
    # The first two are not counted.
    assert results == dict(a=[7, 12, 14], b=[8, 10, 15], c=[9, 11, 13])


def test_progress(machine, capsys):
    in_turn(dict(a=list), Clock(), rounds=2)
    assert not capsys.readouterr().err
    in_turn(dict(a=list), Clock(), rounds=2, what='steps')
    assert 'steps: round 2 of 2' in capsys.readouterr().err


def test_slow_moments_do_not_move_the_least(machine):
    calls = []

    def work(name, seconds):
        calls.append(name)
        # All rounds but one in ten meet another program.
        machine.run(seconds if calls.count(name) % 10 == 5 else 50 * seconds)

    functions = [lambda: work('slow', 0.02), lambda: work('fast', 0.001)]
    seconds, core_share = least_seconds(functions)
    assert seconds == pytest.approx([0.02, 0.001])
    assert core_share == pytest.approx(1)
    assert calls.count('slow') == calls.count('fast')


def test_short_functions_have_more_rounds(machine):
    def counted(seconds):
        calls = []
        least_seconds([lambda: calls.append(machine.run(seconds))])
        return len(calls)

    assert counted(10) == timing.ROUNDS + 2
    assert counted(0.016) == pytest.approx(timing.SECONDS / 0.02, abs=2)


@pytest.mark.parametrize('share', [1, 0.9, 0.5, 0.04])
def test_a_busy_machine(machine, share, monkeypatch):
    """Threads that need not wait for each other had to wait for a core."""
    run = machine.run
    monkeypatch.setattr(torch.Tensor, 'digamma', lambda _: run(0.004, share))
    # What waits for itself is no sign of other programs.
    _, core_share = least_seconds([lambda: run(0.1, core_share=0.2)])
    assert core_share == pytest.approx(share)
    warning = busy_warning(core_share)
    assert bool(warning) == (share < 0.8)
    assert not warning or f'{share:.0%} of the time' in warning
