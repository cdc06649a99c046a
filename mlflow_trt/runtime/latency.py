"""Times: what a number of runs is summed up to, and how long to measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP_SECONDS = 0.3
WARM_UP_RUNS = 3
LEAST_RUNS = 10
MOST_RUNS = 20_000


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of a number of runs."""

    runs: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        values = np.asarray(milliseconds, np.float64)
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(runs=len(values), mean=float(values.mean()), p50=p50, p90=p90, p99=p99)


def measure(call: Callable[[], object], seconds: float) -> Latency:
    """Call again and again for about so many seconds, after calls to warm up that do not count."""
    _repeat(call, WARM_UP_SECONDS, WARM_UP_RUNS)
    return Latency.of(_repeat(call, seconds, LEAST_RUNS))


def _repeat(call: Callable[[], object], seconds: float, least: int) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < MOST_RUNS and (len(times) < least or time.perf_counter() < end):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times
