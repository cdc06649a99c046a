"""Requests of callers who do not wait: what comes of them is told to a function, by a thread that runs batches.

They join the same batches as those of callers who wait. A thread is needed only for each batch that runs, not for each
request.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable
from typing import Protocol

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.forking import finalize
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import SessionClosedError
from mlflow_trt.runtime.batching.microbatch import QueuedCall
from mlflow_trt.runtime.batching.own_threads import start_thread
from mlflow_trt.runtime.batching.sizes import Sizes

Done = Callable[["Outputs | None", "Exception | None"], object]
"""Told what came of a request: its outputs, or the error; the other one is None."""

_log = get_logger(__name__)


class Submission(Protocol):
    """A request that was submitted.

    Attributes:
        begun: when it had its turn, by `time.monotonic`; None before, and where it is not known.
    """

    begun: float | None

    def cancel(self) -> bool:
        """Forget it: `done` is not called any more, and what is not running yet does not run for it.

        False where `done` has been called, or is about to be.
        """


class PendingAnswer:
    """Calls `done` once, unless it was cancelled before."""

    __slots__ = ("_done", "_lock", "begun")

    def __init__(self, done: Done) -> None:
        self.begun: float | None = None
        self._done: Done | None = done
        self._lock = threading.Lock()

    @property
    def is_wanted(self) -> bool:
        return self._done is not None

    def cancel(self) -> bool:
        return self._take() is not None

    def give(self, outputs: Outputs | None, error: Exception | None = None) -> None:
        done = self._take()
        if done is None:
            return
        try:
            done(outputs, error)
        except Exception:  # noqa: BLE001  # of whoever submitted it: the others of the batch go on
            _log.exception("What was to be told of a request's end failed")

    def _take(self) -> Done | None:
        with self._lock:
            done, self._done = self._done, None
        return done


class SubmittedRequest(QueuedCall):
    """A request whose caller does not wait. `ended` is told when its batch has, whatever came of it."""

    __slots__ = ("_ended", "answer")

    def __init__(
        self,
        feeds: Feeds,
        rows: int,
        profile: int,
        sizes: Sizes,
        key: Hashable,
        answer: PendingAnswer,
        ended: Callable[[SubmittedRequest], None],
    ) -> None:
        super().__init__(feeds, rows, profile, sizes, key)
        self.answer = answer
        self._ended = ended

    @property
    def is_wanted(self) -> bool:
        return self.answer.is_wanted

    def withdraw(self) -> None:
        super().withdraw()
        self._ended(self)


class Threads:
    """Do what nobody waits for, a few tasks at a time; started when first needed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._refuses = False

    def check_open(self) -> None:
        """Raises SessionClosedError after `refuse`."""
        if self._refuses:
            raise SessionClosedError

    def do(self, task: Callable[[], None]) -> None:
        """In the caller's thread where the system has none to give. Raises SessionClosedError after `refuse`."""
        with self._lock:
            self.check_open()
            if len(self._threads) < self._most:
                self._start_another()
            if self._threads:
                self._tasks.put(task)
                return
        _do(task)

    def refuse(self) -> None:
        """Take no more tasks."""
        with self._lock:
            self._refuses = True

    def close(self) -> None:
        """Take no more tasks, and wait for the end of those there are, unless one of them calls this."""
        self.refuse()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _start_another(self) -> None:
        thread = start_thread("run", _work, self._tasks)
        if thread is None:
            return
        if not self._threads:
            finalize(self, _end, self._tasks, self._most)
        self._threads.append(thread)


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        _do(task)
        del task  # or what it refers to would stay until the next one


def _do(task: Callable[[], None]) -> None:
    try:
        task()
    except Exception:  # noqa: BLE001  # who calls this goes on with the next task
        _log.exception("A task of the session's own threads failed")


def _end(tasks: queue.SimpleQueue[Callable[[], None] | None], threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)
