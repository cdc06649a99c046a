"""Steps of a call, and trying again.

A call is a generator of steps: a request, to be answered by a response or an exception, or seconds to wait. Whoever
does the sending and waiting, on threads or on asyncio, does it for all kinds of calls.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import TypeVar

import httpx

from mlflow_trt.core.wire import Request

T = TypeVar("T")
Answer = httpx.Response | httpx.TransportError | None
Steps = Generator[Request | float, Answer, T]

TRY_AGAIN = frozenset({429, 502, 503})
"""The server, or what stands before it, is busy or starting. Predicting changes nothing, so it may be tried again."""

_LONGEST_PAUSE = 10.0


class Attempts:
    """How often a request is tried, and how long it waits in between."""

    def __init__(self, *, retries: int, backoff: float) -> None:
        self._retries = retries
        self._backoff = backoff

    def answered(self, request: Request) -> Steps[httpx.Response]:
        """The response, which may be an error. Raises ServerUnavailableError and ServerTimeoutError."""
        for attempt in range(self._retries + 1):
            answer = yield request
            last = attempt == self._retries
            if isinstance(answer, httpx.Response):
                if last or answer.status_code not in TRY_AGAIN:
                    return answer
                yield self._pause(attempt, answer.headers.get("retry-after"))
            # A server that is still at it would only have to do it twice.
            elif last or isinstance(answer, (httpx.ReadTimeout, httpx.WriteTimeout)):
                raise _unavailable(answer, attempt + 1)
            else:
                yield self._pause(attempt, None)
        raise AssertionError("unreachable")

    def _pause(self, attempt: int, asked: str | None) -> float:
        """Seconds: what the server asks for, else twice as long each time, and no two clients at the same moment."""
        if asked is not None and asked.isdigit():
            return min(float(asked), _LONGEST_PAUSE)
        longest = min(self._backoff * 2.0**attempt, _LONGEST_PAUSE)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311  # no secret


def _unavailable(error: httpx.TransportError | None, attempts: int) -> Exception:
    from mlflow_trt.errors import ServerTimeoutError, ServerUnavailableError

    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return ServerTimeoutError(f"no answer in time ({what}); raise timeout=, or send fewer rows")
    tries = f"{attempts} attempt{'s' if attempts > 1 else ''}"
    # A server that answers 503 without reading the request may close the connection before the answer is read.
    if isinstance(error, (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)):
        return ServerUnavailableError(
            f"the server broke the connection off after {tries} ({what}); it stopped, or had too much to do: see its "
            "log, or raise retries="
        )
    return ServerUnavailableError(
        f"no server answers after {tries} ({what}); check the address, and that `mlflow-trt serve` or `mlflow models "
        "serve` runs there"
    )
