"""Feeds into a session, outputs out of it, without waiting: the seam between the event loop and what runs models."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.runtime.session import Session

Done = Callable[["Outputs | None", "Exception | None"], object]
"""Told what came of a request: its outputs, or the error; the other one is None."""

_MOST_THREADS = 64  # a session puts as many calls together at most


class Submission:
    """A request that was submitted. `begun` is when its turn came, 0 before."""

    __slots__ = ("begun", "done", "feeds")

    def __init__(self, feeds: Feeds, done: Done) -> None:
        self.feeds = feeds
        self.done: Done | None = done
        self.begun = 0.0

    def cancel(self) -> None:
        """Forget it: nothing runs for it that does not run already, and `done` is called at most by what does."""
        self.done = None


class Runs:
    """Runs the calls of one session in a few threads, which start when they are needed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: queue.SimpleQueue[Submission | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pending = 0
        self._lock = threading.Lock()

    def submit(self, feeds: Feeds, done: Done) -> Submission:
        """Run feeds; `done` is called in one of the threads, and must not raise. To be called by one thread only."""
        with self._lock:
            self._pending += 1
            lacks_threads = self._pending > len(self._threads) and len(self._threads) < _MOST_THREADS
        if lacks_threads:
            thread = threading.Thread(target=self._work, name=f"mlflow-trt-run-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        submission = Submission(feeds, done)
        self._waiting.put(submission)
        return submission

    def close(self) -> None:
        """Run what was submitted, then end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (submission := self._waiting.get()) is not None:
            self._run(submission)
            submission = None  # its arrays would stay until the next one comes
            with self._lock:
                self._pending -= 1

    def _run(self, submission: Submission) -> None:
        done = submission.done
        if done is None:
            return
        submission.begun = time.monotonic()
        outputs: Outputs | None = None
        failure: Exception | None = None
        try:
            outputs = self._session.run(submission.feeds)
        except Exception as error:  # noqa: BLE001  # whoever submitted it decides what it means
            failure = error
        done(outputs, failure)
