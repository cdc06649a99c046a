"""Requests that run a model: within limits, counted, and with an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from mlflow_trt.core import open_inference as oip
from mlflow_trt.deploy.serve.http import Exchange
from mlflow_trt.deploy.serve.inference import Inference
from mlflow_trt.deploy.serve.limits import Admission, Deadline, Limits, Ticket
from mlflow_trt.deploy.serve.mlflow_wire import invoke
from mlflow_trt.deploy.serve.problems import Cause, DisconnectedError, HttpError, http_error_of
from mlflow_trt.deploy.serve.protocol import Regions
from mlflow_trt.deploy.serve.served_model import ServedModel
from mlflow_trt.errors import ExecutionError

_MLFLOW_THREADS = 32
_Call = Callable[[Exchange, ServedModel, Ticket, Deadline], Awaitable[None]]


class Calls:
    """Runs models for requests.

    Args:
        limits: what is refused.
        regions: memory that clients share; None for none.
        lost: told why nothing can run any more.
    """

    def __init__(self, limits: Limits, regions: Regions | None, lost: Callable[[str], None]) -> None:
        self.admission = Admission(limits)
        self._seconds = limits.seconds
        self._most_bytes = limits.unpacked_bytes
        self._regions = regions
        self._lost = lost
        self._inference: Inference | None = None
        self._threads = ThreadPoolExecutor(_MLFLOW_THREADS, "mlflow-trt-invocations")

    async def infer(self, exchange: Exchange, model: ServedModel) -> None:
        """Answer a request of the Open Inference Protocol. Raises HttpError and DisconnectedError."""
        await self._guarded(self._infer, exchange, model)

    async def invoke(self, exchange: Exchange, model: ServedModel) -> None:
        """Answer a request of MLflow's. Raises HttpError and DisconnectedError."""
        await self._guarded(self._invoke, exchange, model)

    async def _guarded(self, call: _Call, exchange: Exchange, model: ServedModel) -> None:
        began = time.monotonic()
        model.users += 1
        try:
            with self.admission.enter() as ticket, Deadline(asyncio.get_running_loop(), self._seconds) as deadline:
                await call(exchange, model, ticket, deadline)
        except DisconnectedError:
            model.statistics.failed_with(Cause.DISCONNECTED, time.monotonic() - began)
            raise
        except Exception as error:  # noqa: BLE001  # it is raised again
            if isinstance(error, ExecutionError) and (reason := model.session.broken()) is not None:
                self._lost(reason)
            problem = _too_late(exchange) if isinstance(error, TimeoutError) else http_error_of(error)
            model.statistics.failed_with(problem.cause, time.monotonic() - began)
            problem.is_counted = True
            try:
                if problem is error:
                    raise
                raise problem from error
            finally:
                del problem  # it knows this frame: the body would stay until the garbage collector comes
        finally:
            model.release()

    async def _infer(self, exchange: Exchange, model: ServedModel, ticket: Ticket, deadline: Deadline) -> None:
        if self._inference is None:  # the event loop is there with the first request
            self._inference = Inference(asyncio.get_running_loop(), self._regions)
        header_length = exchange.number(oip.HEADER_LENGTH)
        body = await exchange.read(ticket, aligned_at=header_length or 0)
        await self._inference.infer(model, exchange, body, header_length, deadline)

    async def _invoke(self, exchange: Exchange, model: ServedModel, ticket: Ticket, deadline: Deadline) -> None:
        body = await exchange.read(ticket)
        kind = exchange.headers.get(b"content-type", b"")
        began = time.monotonic()
        invoked = await asyncio.get_running_loop().run_in_executor(
            self._threads, invoke, model, body, kind, self._most_bytes
        )
        deadline.end()
        await exchange.answer(200, [invoked.body], invoked.kind)
        model.statistics.invoked(time.monotonic() - began)

    def close(self) -> None:
        """Wait for the calls that run."""
        self._threads.shutdown()


def _too_late(exchange: Exchange) -> HttpError:
    if not exchange.is_read:
        return HttpError(408, Cause.DEADLINE, "the body did not come in time", closes=True)
    return HttpError(504, Cause.DEADLINE, "no answer in time; send fewer rows, or again later")
