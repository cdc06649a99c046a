"""Times: what a number of runs is summed up to, and how long to measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP_SECONDS = 0.3
WARM_UP_RUNS = 3
LEAST_RUNS = 10
MOST_RUNS = 20_000
ROUNDS = 10
"""Into how many turns the time of each is divided, where several are measured."""

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of a number of runs.

    Attributes:
        runs: how many.
        mean: their mean.
        p10: the 10th percentile.
        p50: the median.
        p90: the 90th percentile.
        p99: the 99th percentile.
    """

    runs: int
    mean: float
    p10: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        values = np.asarray(milliseconds, np.float64)
        p10, p50, p90, p99 = (float(value) for value in np.percentile(values, (10, 50, 90, 99)))
        return cls(runs=len(values), mean=float(values.mean()), p10=p10, p50=p50, p90=p90, p99=p99)


def measure(call: Callable[[], object], seconds: float) -> Latency:
    """Call again and again for about so many seconds, after calls to warm up that do not count."""
    return measure_in_turns([call], seconds)[0]


def measure_in_turns(
    calls: Sequence[Callable[[], object]], seconds: float, clock: Clock = time.perf_counter
) -> list[Latency]:
    """Measure each call for about so many seconds, in turns, so that whatever else the machine does meets all alike.

    The first call of a turn does not count where there are several: it pays for what the one before left behind.
    """
    for call in calls:
        _repeat(call, WARM_UP_SECONDS, WARM_UP_RUNS, clock)
    times: list[list[float]] = [[] for _ in calls]
    for number in turns(len(calls)):
        if len(calls) > 1:
            calls[number]()
        times[number] += _repeat(calls[number], seconds / ROUNDS, LEAST_RUNS // ROUNDS, clock)
    return [Latency.of(one) for one in times]


def turns(count: int) -> Iterator[int]:
    """The order in which several take turns, each `ROUNDS` times: forwards and back again, so that none is favoured."""
    for number in range(ROUNDS):
        yield from range(count) if number % 2 == 0 else reversed(range(count))


def _repeat(call: Callable[[], object], seconds: float, least: int, clock: Clock) -> list[float]:
    times: list[float] = []
    end = clock() + seconds
    while len(times) < MOST_RUNS and (len(times) < least or clock() < end):
        started = clock()
        call()
        times.append((clock() - started) * 1e3)
    return times
