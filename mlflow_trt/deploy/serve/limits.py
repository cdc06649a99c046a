"""How much a server takes at once, and how long it tries."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from typing_extensions import Self

from mlflow_trt.deploy.serve.problems import Cause, HttpError
from mlflow_trt.errors import OptionError

_RETRY = ((b"retry-after", b"1"),)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused instead of taken.

    Args:
        requests: how many may be read, wait or run at the same time; more are answered with 429.
        body_bytes: the largest body; a larger one is answered with 413.
        unpacked_bytes: the largest table, which parquet can pack into a small body; a larger one is answered with 413.
        pending_bytes: of all bodies together; more are answered with 429.
        seconds: for a request, from its first byte to its answer: then 408 where its body was not read, else 504.
            A request may ask for less.

    Raises:
        OptionError: a limit makes no sense.
    """

    requests: int = 1024
    body_bytes: int = 256 << 20
    unpacked_bytes: int = 512 << 20
    pending_bytes: int = 2 << 30
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for option in ("requests", "body_bytes", "unpacked_bytes", "pending_bytes", "seconds"):
            if not 0 < getattr(self, option) < float("inf"):
                raise OptionError(f"{option} is {getattr(self, option)}; expected a number above 0", option=option)
        if self.pending_bytes < self.body_bytes:
            raise OptionError(
                f"pending_bytes is {self.pending_bytes}, and one body may have {self.body_bytes}; expected at least "
                "as much",
                option="pending_bytes",
            )


class Admission:
    """Who may come in: the event loop's count of requests and their bytes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.bytes = 0

    def enter(self) -> Ticket:
        """A place among the requests that are worked on. Raises HttpError, 429, where there is none."""
        if self.requests >= self.limits.requests:
            raise HttpError(
                429,
                Cause.BUSY,
                f"the server works on {self.requests} requests, as many as it takes; try again",
                headers=_RETRY,
            )
        return Ticket(self)


class Ticket:
    """One request's place, for the length of a block, and the bytes that it holds."""

    __slots__ = ("_admission", "bytes")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.bytes = 0

    def hold(self, size: int) -> None:
        """So many more bytes. Raises HttpError: 413 for a body that is too large, 429 where all are together."""
        limits = self._admission.limits
        if self.bytes + size > limits.body_bytes:
            raise HttpError(
                413,
                Cause.TOO_LARGE,
                f"the body has more than {limits.body_bytes} bytes, the most that the server takes; send fewer rows",
            )
        if self._admission.bytes + size > limits.pending_bytes:
            raise HttpError(
                429,
                Cause.BUSY,
                f"the server holds {self._admission.bytes} bytes of requests, as many as it takes; try again",
                headers=_RETRY,
            )
        self.bytes += size
        self._admission.bytes += size

    def __enter__(self) -> Self:
        self._admission.requests += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.requests -= 1
        self._admission.bytes -= self.bytes


class Deadline:
    """Cancels the task that entered the block, when its time is over, and says so by TimeoutError.

    `asyncio.timeout`, which Python 3.10 has not; and the time can be cut while it runs.
    """

    __slots__ = ("_handle", "_loop", "_started", "_task", "expired")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._started = loop.time()
        self._task = asyncio.current_task(loop)
        self._handle = loop.call_later(seconds, self._expire)
        self.expired = False

    def cut(self, seconds: float) -> None:
        """Let it end so many seconds after it began."""
        until = self._started + seconds
        if until < self._handle.when():
            self._handle.cancel()
            self._handle = self._loop.call_at(until, self._expire)

    def end(self) -> None:
        """From now on there is none: how long a client takes for its answer is up to the connection."""
        self._handle.cancel()

    def _expire(self) -> None:
        self.expired = True
        if self._task is not None:
            self._task.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.cancel()
        if self.expired and kind is not None and issubclass(kind, asyncio.CancelledError):
            if self._task is not None and hasattr(self._task, "uncancel"):  # Python 3.11 counts
                self._task.uncancel()
            raise TimeoutError
