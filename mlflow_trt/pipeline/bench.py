"""Where engines are timed: the GPU of this machine, behind a protocol.

Everything that has to be decided about measurements is decided elsewhere, on numbers. What needs a GPU is here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np

from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.core.arrays import Array, Feeds
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.types import Gpu, Shape
from mlflow_trt.errors import EngineMismatchError
from mlflow_trt.pipeline.verify import engine_session, why_not_here
from mlflow_trt.runtime.cuda.device import open_device

_ROUND_MILLISECONDS = 150.0
_LEAST_RUNS, _MOST_RUNS = 5, 500
_WARM_UP_RUNS = 10

Round = Callable[[], float]
"""Runs an engine for a moment, and returns the median milliseconds of a run."""


class Bench(Protocol):
    """A GPU that engines can be timed on."""

    @property
    def gpu(self) -> Gpu: ...

    @property
    def description(self) -> str:
        """The GPU and what runs engines on it, for people."""

    def load_engine(self, conversion: Conversion, feeds: Feeds) -> AbstractContextManager[Round]:
        """An engine that is loaded and warm, for inputs that it takes at once.

        Loading or running it raises EngineMismatchError or ExecutionError where the engine does not run here.
        """
        ...


class GpuBench:
    """The GPU of this machine.

    Raises RuntimeUnavailableError, or MissingDependencyError which is one, where there is none that can be used.
    """

    def __init__(self, settings: LoadSettings) -> None:
        self._settings = settings
        self._tensorrt = trt.load()
        self._device = open_device(settings.first_device)

    @property
    def gpu(self) -> Gpu:
        return self._device.gpu

    @property
    def description(self) -> str:
        return f"{self.gpu}, {self._tensorrt}, driver {self._device.hardware.driver}"

    @contextmanager
    def load_engine(self, conversion: Conversion, feeds: Feeds) -> Iterator[Round]:
        reason = why_not_here(conversion, self._settings)
        if reason is not None:
            raise EngineMismatchError(f"the engine does not run here: {reason}", reasons=(reason,))
        with engine_session(conversion, self._settings) as session:

            def one(runs: int) -> float:
                return statistics.median(phase.engine for phase in session.time_phases(feeds, runs))

            usual = one(_WARM_UP_RUNS)
            runs = max(_LEAST_RUNS, min(_MOST_RUNS, int(_ROUND_MILLISECONDS / max(usual, 1e-3))))
            yield lambda: one(runs)


def usual_feeds(conversion: Conversion) -> Feeds:
    """Inputs of the opt shapes of the first profile: sample inputs, repeated or cut along every axis."""
    ranges = conversion.profiles.profiles[0].ranges if conversion.profiles.profiles else {}
    feeds = dict(conversion.samples.feeds[0])
    for name, limits in ranges.items():
        array = feeds[name]
        if limits.is_values:
            feeds[name] = np.asarray(limits.opt, array.dtype).reshape(array.shape)
        else:
            feeds[name] = _resized(array, limits.opt)
    return feeds


def _resized(array: Array, shape: Shape) -> Array:
    """`array` repeated or cut along every axis."""
    if not array.size:
        return np.zeros(shape, array.dtype)
    for axis, size in enumerate(shape):
        array = np.take(array, np.arange(size), axis=axis, mode="wrap")
    return np.ascontiguousarray(array)
