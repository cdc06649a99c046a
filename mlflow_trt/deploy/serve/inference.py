"""One request of the Open Inference Protocol, from its body to its answer: the hot path."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import NamedTuple

from mlflow_trt.core.arrays import Outputs
from mlflow_trt.deploy.serve.http import Exchange
from mlflow_trt.deploy.serve.limits import Deadline
from mlflow_trt.deploy.serve.problems import DisconnectedError
from mlflow_trt.deploy.serve.protocol import Answer, InferRequest, Regions, make_answer, parse_request
from mlflow_trt.deploy.serve.served_model import ServedModel
from mlflow_trt.deploy.serve.statistics import Times

_LARGE_JSON = 1 << 16
_PATIENCE = 0.05
"""Seconds before a request that waits looks whether its client is still there: most are answered before."""


class _WrittenOutputs(NamedTuple):
    answer: Answer
    ended: float
    rows: int


class Mailbox:
    """Results from other threads to the futures of an event loop, which is woken up once for all that are there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._results: list[tuple[asyncio.Future[_WrittenOutputs], _WrittenOutputs | Exception]] = []
        self._lock = threading.Lock()

    def put(self, future: asyncio.Future[_WrittenOutputs], result: _WrittenOutputs | Exception) -> None:
        """From any thread."""
        with self._lock:
            self._results.append((future, result))
            is_first = len(self._results) == 1  # those that come later are taken along
        if is_first:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits any more
                self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        with self._lock:
            results, self._results = self._results, []
        for future, result in results:
            if future.done():  # cancelled: nobody waits for it any more
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


class Inference:
    """Parses, runs and answers, on one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, regions: Regions | None) -> None:
        self._loop = loop
        self._mailbox = Mailbox(loop)
        self._regions = regions

    async def infer(
        self, model: ServedModel, exchange: Exchange, body: memoryview, header_length: int | None, deadline: Deadline
    ) -> None:
        """Answer the request, and count it.

        Raises InputError, what the session raises, DisconnectedError and TimeoutError.
        """
        arrived = time.monotonic()
        if header_length is None and len(body) > _LARGE_JSON:  # it takes long, and others want the event loop
            request = await self._loop.run_in_executor(
                None, parse_request, body, header_length, model.signature, self._regions
            )
        else:
            request = parse_request(body, header_length, model.signature, self._regions)
        if request.timeout is not None:
            deadline.cut(request.timeout)
        parsed = time.monotonic()
        written, begun = await self._run(model, exchange, request)
        answered = time.monotonic()
        deadline.end()
        await exchange.answer_tensors(*written.answer)
        times = Times(arrived, parsed, begun or parsed, written.ended, answered)
        model.statistics.succeeded(times, written.rows)

    async def _run(
        self, model: ServedModel, exchange: Exchange, request: InferRequest
    ) -> tuple[_WrittenOutputs, float | None]:
        """What is to be answered, and when the run began."""
        future: asyncio.Future[_WrittenOutputs] = self._loop.create_future()
        mailbox = self._mailbox

        def done(outputs: Outputs | None, failure: Exception | None) -> None:
            """In a thread of the session, while the event loop has other things to do."""
            ended = time.monotonic()
            result: _WrittenOutputs | Exception
            try:
                if outputs is None:
                    result = failure or RuntimeError("a run without outputs and without an error")
                else:
                    answer = make_answer(request, model.name, model.version, outputs)
                    result = _WrittenOutputs(answer, ended, _rows(outputs))
            except Exception as error:  # noqa: BLE001  # it goes to whoever waits
                result = error
            mailbox.put(future, result)

        submission = model.session.submit(request.feeds, done)
        watch = _Watch(self._loop, exchange, future)
        try:
            return await future, submission.begun
        except asyncio.CancelledError:
            submission.cancel()
            if watch.is_gone:
                raise DisconnectedError from None
            raise
        finally:
            watch.stop()


class _Watch:
    """Cancels a future when the client of its request is gone."""

    __slots__ = ("_exchange", "_future", "_handle", "_task", "is_gone")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, exchange: Exchange, future: asyncio.Future[_WrittenOutputs]
    ) -> None:
        self.is_gone = False
        self._exchange = exchange
        self._future = future
        self._task: asyncio.Task[None] | None = None
        self._handle = loop.call_later(_PATIENCE, self._begin)

    def stop(self) -> None:
        self._handle.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None  # its error will know the frames that know it, and the request

    def _begin(self) -> None:
        self._task = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        await self._exchange.disconnected()
        if not self._future.done():
            self.is_gone = True
            self._future.cancel()


def _rows(outputs: Outputs) -> int:
    return max((len(array) if array.ndim else 1 for array in outputs.values()), default=0)
