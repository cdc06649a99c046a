"""Show how far a long step is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.printable import printable
from mlflow_trt.core.progress_event import BuildProgress
from mlflow_trt.core.progress_event import Progress as ProgressCallback

_log = get_logger(__name__)
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress(what: str) -> Iterator[ProgressCallback]:
    """Give a callback that shows the builder's progress on standard error; nothing appears before it is called."""
    console = Console(stderr=True)
    display = _Bar(what, console) if console.is_terminal else _Lines(what)
    try:
        yield display.show
    finally:
        display.close()


@contextmanager
def choose_progress(what: str, given: ProgressCallback | None) -> Iterator[ProgressCallback]:
    """The callback that was given, or one that shows progress on standard error."""
    if given is not None:
        yield given
    else:
        with show_progress(what) as shown:
            yield shown


class _Bar:
    def __init__(self, what: str, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[phase]}", style="dim", markup=False),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(printable(what), total=1.0, phase="")

    def show(self, event: BuildProgress) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=event.fraction, phase=printable(event.phase))

    def close(self) -> None:
        self._bar.stop()


class _Lines:
    """Progress for logs: one line at the beginning and one every few seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started: float | None = None
        self._last = 0.0

    def show(self, event: BuildProgress) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = self._last = now
            _log.info("%s ...", self._what)
        elif now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            seconds = now - self._started
            _log.info("%s: %.0f %% after %.0f s, %s", self._what, 100 * event.fraction, seconds, event.phase)

    def close(self) -> None:
        pass
