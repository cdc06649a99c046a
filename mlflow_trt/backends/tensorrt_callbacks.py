"""Objects that TensorRT calls: a logger, monitors and an allocator.

Their base classes come from the imported distribution, so each is made by a function that gets its module.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

from mlflow_trt.backends import tensorrt_api as trt_api
from mlflow_trt.core.log import get_logger

_log = get_logger(__name__)


class _Log:
    """Keeps the last error lines that TensorRT wrote, and passes everything on to Python's logging at DEBUG.

    TensorRT has one logger for the whole process, and sessions run in many threads: each line is kept with its thread.
    """

    def __init__(self) -> None:
        self._errors: collections.deque[tuple[int, str]] = collections.deque(maxlen=100)
        self._lock = threading.Lock()

    def keep(self, message: str) -> None:
        with self._lock:
            self._errors.append((threading.get_ident(), message.strip()))

    def errors(self) -> list[str]:
        """The error lines of the calling thread, and of TensorRT's own threads, since the last call; oldest first."""
        if not self._errors:  # nearly always, and asked after each run
            return []
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        with self._lock:
            mine = [line for thread, line in self._errors if thread not in others]
            kept = [(thread, line) for thread, line in self._errors if thread in others]
            self._errors.clear()
            self._errors.extend(kept)
        return mine

    def last_error(self) -> str:
        """The newest of these lines, or a word that there is none."""
        lines = self.errors()
        return lines[-1] if lines else "TensorRT's log says nothing more"


def new_logger(module: Any) -> Any:
    severity = cast(trt_api.Severity, module.ILogger.Severity)

    class Logger(_Log, module.ILogger):  # type: ignore[misc]  # the base class comes from the imported distribution
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            _Log.__init__(self)

        def log(self, level: trt_api.Enumerator, message: str) -> None:
            # Errors are quoted by whoever finds that a call failed; here they would only be said twice.
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.keep(message)
            if level != severity.VERBOSE:
                _log.debug("%s", message.strip())

    return Logger()


class _Phases:
    """The phases that run, one inside the other; several may have one name, of which the inner one goes on or ends."""

    class Phase:
        def __init__(self, name: str, steps: int) -> None:
            self.name = name
            self.steps = max(steps, 1)
            self.done = 0

    def __init__(self) -> None:
        self._phases: list[_Phases.Phase] = []

    def start(self, name: str, steps: int) -> None:
        self._phases.append(self.Phase(name, steps))

    def advance(self, name: str, step: int) -> None:
        phase = self._innermost(name)
        if phase is not None:
            phase.done = min(step + 1, phase.steps)

    def finish(self, name: str) -> None:
        ended = self._innermost(name)
        self._phases = [phase for phase in self._phases if phase is not ended]

    def current(self) -> tuple[str, float] | None:
        """The innermost phase, and the fraction of the whole; None where none runs."""
        fraction = 0.0
        for phase in reversed(self._phases):
            fraction = min((phase.done + fraction) / phase.steps, 1.0)
        return (self._phases[-1].name, fraction) if self._phases else None

    def _innermost(self, name: str) -> Phase | None:
        return next((phase for phase in reversed(self._phases) if phase.name == name), None)


def new_progress_monitor(module: Any, report: Callable[[str, float], None]) -> trt_api.IProgressMonitor:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases = _Phases()
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(phase_name, num_steps)
                self._report()

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._phases.advance(phase_name, step)
                self._report()
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.finish(phase_name)

        def _report(self) -> None:
            current = self._phases.current()
            if current is not None:
                report(*current)

    return cast(trt_api.IProgressMonitor, Monitor())


def new_profiler(module: Any, report: Callable[[str, float], None]) -> trt_api.IProfiler:
    class Profiler(module.IProfiler):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms)

    return cast(trt_api.IProfiler, Profiler())


def new_output_allocator(
    module: Any, reallocate: Callable[[str, int], int], notify: Callable[[str, tuple[int, ...]], None]
) -> object:
    class OutputAllocator(module.IOutputAllocator):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            module.IOutputAllocator.__init__(self)

        def reallocate_output_async(
            self, tensor_name: str, _memory: int, size: int, _alignment: int, _stream: int
        ) -> int:
            return reallocate(tensor_name, size)

        def notify_shape(self, tensor_name: str, shape: Sequence[int]) -> None:
            notify(tensor_name, tuple(shape))

    return OutputAllocator()
