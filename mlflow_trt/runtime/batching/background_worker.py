"""Jobs that nobody waits for, done one after the other in a thread that is there only while there are some."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from mlflow_trt.core.log import get_logger
from mlflow_trt.runtime.batching.own_threads import start_thread

Job = Callable[[], object]

_log = get_logger(__name__)


class BackgroundWorker:
    """A queue of jobs, and the thread that does them.

    Only jobs refer to whoever submits them: where there are none, nothing here keeps anything alive.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: collections.deque[Job] = collections.deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job) -> bool:
        """Have a job done after those submitted before.

        False where it is left out: after `close`, and where the system has no thread to give, which passes.
        """
        with self._lock:
            if self._closed:
                return False
            if self._thread is None:
                self._thread = start_thread(self._name, self._work)
                if self._thread is None:
                    return False
            self._jobs.append(job)  # which the thread, if it is new, waits for at the lock
            return True

    def close(self) -> None:
        """Begin no job any more, and wait for the end of the one that runs."""
        with self._lock:
            self._closed = True
            self._jobs.clear()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:  # noqa: BLE001  # the next job is not to blame
                _log.exception("A job beside the calls failed")
            del job  # or what it refers to would stay until the next one
