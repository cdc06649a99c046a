"""What happened to the requests of a model, as Triton's statistics and Prometheus's metrics tell it.

Only the event loop writes here, so there are no locks; a scrape on another thread may be a request behind.
"""

from __future__ import annotations

import bisect
import collections
import time
from typing import Any, NamedTuple

from mlflow_trt.deploy.serve.problems import Cause

BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histograms, in seconds: from what a copy takes to what a deadline allows."""


class Times(NamedTuple):
    """When a request was read, and its tensors were; when it had its turn, had run, and was answered.

    In seconds of one clock. A turn that is not known counts as one at once.
    """

    arrived: float
    parsed: float
    begun: float
    ended: float
    answered: float


class Histogram:
    """How often seconds fell into each bucket, the last of which is for all beyond."""

    __slots__ = ("count", "counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.count = 0
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.count += 1
        self.seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulated, as Prometheus wants them."""
        total = 0
        found = []
        for edge, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            total += count
            found.append((edge, float(total)))
        return found

    def told(self) -> dict[str, int]:
        """As Triton tells it."""
        return {"count": self.count, "ns": int(self.seconds * 1e9)}


class Statistics:
    """Of one version of a model."""

    def __init__(self) -> None:
        self.total = Histogram()
        self.reading = Histogram()
        self.waiting = Histogram()
        self.inference = Histogram()
        self.writing = Histogram()
        self.failed = Histogram()
        self.rows = 0
        self.failures: collections.Counter[Cause] = collections.Counter()
        self.last: float | None = None

    def succeeded(self, times: Times, rows: int) -> None:
        self.total.observe(times.answered - times.arrived)
        self.reading.observe(times.parsed - times.arrived)
        self.waiting.observe(times.begun - times.parsed)
        self.inference.observe(times.ended - times.begun)
        self.writing.observe(times.answered - times.ended)
        self.rows += rows
        self.last = time.time()

    def invoked(self, seconds: float) -> None:
        """A request on MLflow's wire, of whose parts nothing is known."""
        self.total.observe(seconds)
        self.last = time.time()

    def failed_with(self, cause: Cause, seconds: float) -> None:
        self.failed.observe(seconds)
        self.failures[cause] += 1

    def told(self, name: str, version: str, runs: dict[int, int]) -> dict[str, Any]:
        """As Triton's extension `statistics` tells it.

        Of a batch, only how often its size was run is known.
        """
        nothing = {"count": 0, "ns": 0}
        return {
            "name": name,
            "version": version,
            "last_inference": int(self.last * 1000) if self.last is not None else 0,
            "inference_count": self.rows,
            "execution_count": sum(runs.values()),
            "inference_stats": {
                "success": self.total.told(),
                "fail": self.failed.told(),
                "queue": self.waiting.told(),
                "compute_input": self.reading.told(),
                "compute_infer": self.inference.told(),
                "compute_output": self.writing.told(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": nothing,
                    "compute_infer": {"count": count, "ns": 0},
                    "compute_output": nothing,
                }
                for size, count in runs.items()
            ],
            "memory_usage": [],
        }
