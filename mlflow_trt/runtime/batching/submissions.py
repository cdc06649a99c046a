"""Requests of callers who do not wait: what comes of them is told to a function, by a thread that runs batches.

They join the same batches as those of callers who wait. A thread is needed only for each batch that runs, not for each
request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Protocol

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.runtime.batching.microbatch import Request
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


class SubmittedRequest(Request):
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
