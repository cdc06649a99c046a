"""Clients: arrays in, arrays out, over HTTP; for threads and for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import httpx
import numpy.typing as npt
from typing_extensions import Self

from mlflow_trt.client.attempts import Answer, Steps, T
from mlflow_trt.client.prediction import Prediction, option_error
from mlflow_trt.core import wire
from mlflow_trt.core.arrays import Outputs

_CONNECT_SECONDS = 5.0
_READY = ("/ping", "/v2/health/ready")


class Client:
    """Predicts on a server of `mlflow-trt serve`, of the Open Inference Protocol, or of `mlflow models serve`.

    May be shared between threads.

    Args:
        address: like `http://127.0.0.1:5000`.
        timeout: seconds to wait for an answer, more than 0. The first call of a new shape may compile kernels.
        retries: how often to try again where no server answers, or where it answers 429, 502 or 503. A timeout is
            not tried again.
        backoff: seconds before the first retry; each further one waits twice as long.
        wire_format: `auto`: the Open Inference Protocol with binary tensors where the server speaks it, else parquet
            where the inputs fit, else JSON. `v2` (the protocol), `parquet` and `json` insist.
        model: which one of a server of the protocol, as NAME or NAME/VERSION; None for the first of `mlflow-trt serve`
            and for the only one of others.
        output_dtypes: dtypes of outputs by name. JSON knows int64, float64 and bool only; the protocol tells the
            model's own dtypes, and so does MLflow's server with the load setting `answers="base64"`.
        headers: sent with each request, for a proxy that wants authorization.
        transport: how httpx sends; for tests and unusual networks.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.25,
        wire_format: str = "auto",
        model: str | None = None,
        output_dtypes: Mapping[str, npt.DTypeLike] | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._prediction = Prediction(
            retries=retries, backoff=backoff, wire_format=wire_format, model=model, output_dtypes=output_dtypes
        )
        self._http = httpx.Client(**_options(address, timeout, headers), transport=transport)

    def predict(self, inputs: wire.Inputs) -> Outputs:
        """Run the model on arrays by name of input; gives arrays by name of output.

        A value is an array of any rank, a number, nested lists, or a list of `bytes`, one for each row; these go as
        JSON only where the model's signature has binary columns.

        Raises:
            InputError: the server refused the input, and why.
            InputShapeError: an array has another shape than the model or its signature, which the client asks for
                before it sends anything.
            InputDtypeError: numbers would not be the same in the dtype of the model.
            OutOfMemoryError: the server has no room for it.
            ServerError: it failed.
            ServerUnavailableError: there is none.
            ServerTimeoutError: it took too long.
        """
        return self._follow(self._prediction.predict(inputs))

    def invoke(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Ask a whole model, or any other of MLflow's, for what it answers: texts in, labels out.

        Goes to `/invocations` as JSON, which `mlflow-trt serve` and `mlflow models serve` both take.

        Args:
            data: a text, a list, a mapping of columns, arrays, or a pandas DataFrame, whose missing values go as null.
                `bytes` go as base64, which MLflow reads back for binary columns; dates and times as ISO 8601.
            params: what the model takes beside its inputs.

        Returns:
            The answer as JSON has it: a list of rows, a mapping of outputs, ...

        Raises:
            InputError: this cannot be sent, or the server refused it, and why; and what `predict` raises.
        """
        return self._follow(self._prediction.invoke(data, params))

    def _follow(self, steps: Steps[T]) -> T:
        answer: Answer = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, wire.Request):
                    try:
                        answer = self._http.request(step.method, step.path, **_body(step))
                    except httpx.TransportError as error:
                        answer = error
                else:
                    time.sleep(step)
                    answer = None
        except StopIteration as stop:
            result: T = stop.value
            return result

    def ping(self) -> bool:
        """Whether a server is there and ready."""
        try:
            return any(self._http.get(path).is_success for path in _READY)
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Close the connections. May be called more than once."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """Client for asyncio: the same arguments, with `async with` and `await client.predict(...)`."""

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.25,
        wire_format: str = "auto",
        model: str | None = None,
        output_dtypes: Mapping[str, npt.DTypeLike] | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._prediction = Prediction(
            retries=retries, backoff=backoff, wire_format=wire_format, model=model, output_dtypes=output_dtypes
        )
        self._http = httpx.AsyncClient(**_options(address, timeout, headers), transport=transport)

    async def predict(self, inputs: wire.Inputs) -> Outputs:
        """As `Client.predict`, which also lists what is raised."""
        return await self._follow(self._prediction.predict(inputs))

    async def invoke(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """As `Client.invoke`."""
        return await self._follow(self._prediction.invoke(data, params))

    async def _follow(self, steps: Steps[T]) -> T:
        answer: Answer = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, wire.Request):
                    try:
                        answer = await self._http.request(step.method, step.path, **_body(step))
                    except httpx.TransportError as error:
                        answer = error
                else:
                    await asyncio.sleep(step)
                    answer = None
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def ping(self) -> bool:
        """Whether a server is there and ready."""
        try:
            for path in _READY:
                if (await self._http.get(path)).is_success:
                    return True
        except httpx.TransportError:
            pass
        return False

    async def close(self) -> None:
        """Close the connections. May be called more than once."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _options(address: str, timeout: float, headers: Mapping[str, str] | None) -> dict[str, Any]:
    if not address.lower().startswith(("http://", "https://")):
        raise option_error("address", address, "an address like http://127.0.0.1:5000")
    if not timeout > 0:
        raise option_error("timeout", timeout, "more than 0 seconds")
    return {
        "base_url": address.removesuffix("/invocations"),
        "timeout": httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
        "headers": headers,
        "verify": address.lower().startswith("https"),  # reading the certificates takes 20 ms
        # As many connections as there are threads that call: the server queues, not the client.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
    }


def _body(request: wire.Request) -> dict[str, Any]:
    return {"content": request.content, "headers": {"content-type": request.content_type, **request.headers}}
