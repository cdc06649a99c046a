"""A client of MLflow's scoring server: arrays in, arrays out, over HTTP.

    from mlflow_trt.client import Client

    with Client("http://127.0.0.1:5000") as client:
        scores = client.predict({"x": array})["scores"]

Arrays go as parquet, which MLflow's server reads many times faster than JSON; what parquet cannot hold goes as JSON.
Needs the extra `client`, and neither a GPU nor TensorRT.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from mlflow_trt.core import wire

try:
    import httpx
except ImportError as error:
    from mlflow_trt.errors import MissingDependencyError

    raise MissingDependencyError(
        "httpx is not installed: `pip install 'mlflow-trt[client]'`", packages=("httpx",)
    ) from error

Outputs = dict[str, npt.NDArray[np.generic]]

_WIRE_FORMATS = ("auto", "parquet", "json")
_CONNECT_SECONDS = 5.0
_LONGEST_PAUSE = 10.0
# The server, or what stands before it, is busy or starting. Predicting changes nothing, so it may be tried again.
_TRY_AGAIN = {429, 502, 503}


class _Exchange:
    """What one call sends and waits for, whoever does the sending and waiting.

    `predict` is a generator of steps: a request, to be answered by a response or an exception, or seconds to wait.
    """

    def __init__(
        self,
        *,
        retries: int,
        backoff: float,
        wire_format: str,
        output_dtypes: Mapping[str, npt.DTypeLike] | None,
    ) -> None:
        if wire_format not in _WIRE_FORMATS:
            raise _option_error("wire_format", wire_format, f"one of {', '.join(_WIRE_FORMATS)}")
        for option, value in {"retries": retries, "backoff": backoff}.items():
            if value < 0:
                raise _option_error(option, value, "0 or more")
        self._retries = retries
        self._backoff = backoff
        self._wire_format = wire_format
        self._dtypes = dict(output_dtypes or {})
        self._json_only: set[frozenset[str]] = set()  # inputs that the server did not take as parquet
        self._signature: dict[str, wire.Tensor] | None = None  # None before the server was asked

    def predict(
        self, inputs: wire.Inputs
    ) -> Generator[wire.Request | float, httpx.Response | httpx.TransportError | None, Outputs]:
        if not isinstance(inputs, Mapping) or not inputs:
            from mlflow_trt.errors import InputError

            what = "an empty one" if isinstance(inputs, Mapping) else type(inputs).__name__
            raise InputError(f"expected a mapping from input names to arrays, got {what}")
        names = frozenset(inputs)
        as_parquet = self._wire_format == "parquet" or (
            self._wire_format == "auto" and names not in self._json_only and wire.fits_table(inputs)
        )
        if as_parquet:
            wire.check_table(inputs)
            signature = yield from self._checked_signature(inputs)
            request = wire.parquet_request(inputs, signature)
        else:
            request = wire.json_request(inputs)
        response = yield from self._answered(request)
        refused = as_parquet and wire.wants_json(response.status_code, response.content)
        if refused and self._wire_format == "auto":
            self._json_only.add(names)
            response = yield from self._answered(wire.json_request(inputs))
        if response.status_code != httpx.codes.OK:
            raise wire.error_of(response.status_code, response.content)
        return wire.decode_answer(response.content, self._dtypes)

    def _checked_signature(
        self, inputs: wire.Inputs
    ) -> Generator[wire.Request | float, httpx.Response | httpx.TransportError | None, dict[str, wire.Tensor]]:
        """What arrays are compared with, if the server enforces a signature: MLflow shapes rows of a table by it."""
        if self._signature is not None and not wire.misshapen(inputs, self._signature):
            return self._signature
        # Asked again before anything is refused: the server may have another model by now.
        response = yield from self._answered(wire.signature_request())
        if response.status_code in _TRY_AGAIN:
            raise wire.error_of(response.status_code, response.content)
        signature = self._signature = wire.signature_in(response.content)
        if wrong := wire.misshapen(inputs, signature):
            from mlflow_trt.errors import InputShapeError

            raise InputShapeError("; ".join(wrong.values()), tensor=next(iter(wrong)))
        return signature

    def _answered(
        self, request: wire.Request
    ) -> Generator[wire.Request | float, httpx.Response | httpx.TransportError | None, httpx.Response]:
        for attempt in range(self._retries + 1):
            answer = yield request
            last = attempt == self._retries
            if isinstance(answer, httpx.Response):
                if last or answer.status_code not in _TRY_AGAIN:
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


class Client:
    """Predicts on a server that `mlflow models serve` started. May be shared between threads.

    Args:
        address: like `http://127.0.0.1:5000`.
        timeout: seconds to wait for an answer, more than 0. The first call of a new shape may compile kernels.
        retries: how often to try again where no server answers, or where it answers 429, 502 or 503. A timeout is
            not tried again.
        backoff: seconds before the first retry; each further one waits twice as long.
        wire_format: `auto`: parquet where the inputs fit, else JSON. `parquet` and `json` insist.
        output_dtypes: dtypes of outputs by name. JSON knows int64, float64 and bool only; a server that was started
            with the load setting `answers="base64"` tells the model's own dtypes itself.
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
        output_dtypes: Mapping[str, npt.DTypeLike] | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._exchange = _Exchange(
            retries=retries, backoff=backoff, wire_format=wire_format, output_dtypes=output_dtypes
        )
        self._http = httpx.Client(**_options(address, timeout, headers), transport=transport)

    def predict(self, inputs: wire.Inputs) -> Outputs:
        """Run the model on arrays by name of input; gives arrays by name of output.

        A value is an array of any rank, a number, nested lists, or a list of `bytes`; these go as JSON only where the
        model's signature has binary columns.

        Raises:
            InputError: the server refused the input, and why; InputShapeError: an array has another shape than the
                model's signature, which the client asks for before it first sends parquet.
            OutOfMemoryError: it has no room for it.
            ServerError: it failed; ServerUnavailableError: there is none; ServerTimeoutError: it took too long.
        """
        steps = self._exchange.predict(inputs)
        answer: httpx.Response | httpx.TransportError | None = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, wire.Request):
                    try:
                        answer = self._http.post("/invocations", **_body(step))
                    except httpx.TransportError as error:
                        answer = error
                else:
                    time.sleep(step)
                    answer = None
        except StopIteration as stop:
            outputs: Outputs = stop.value
            return outputs

    def ping(self) -> bool:
        """Whether a server is there and ready."""
        try:
            return self._http.get("/ping").is_success
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
        output_dtypes: Mapping[str, npt.DTypeLike] | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._exchange = _Exchange(
            retries=retries, backoff=backoff, wire_format=wire_format, output_dtypes=output_dtypes
        )
        self._http = httpx.AsyncClient(**_options(address, timeout, headers), transport=transport)

    async def predict(self, inputs: wire.Inputs) -> Outputs:
        """As `Client.predict`, which also lists what is raised."""
        steps = self._exchange.predict(inputs)
        answer: httpx.Response | httpx.TransportError | None = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, wire.Request):
                    try:
                        answer = await self._http.post("/invocations", **_body(step))
                    except httpx.TransportError as error:
                        answer = error
                else:
                    await asyncio.sleep(step)
                    answer = None
        except StopIteration as stop:
            outputs: Outputs = stop.value
            return outputs

    async def ping(self) -> bool:
        """Whether a server is there and ready."""
        try:
            return (await self._http.get("/ping")).is_success
        except httpx.TransportError:
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


def _option_error(option: str, value: object, expected: str) -> Exception:
    from mlflow_trt.errors import OptionError

    return OptionError(f"{option} is {value!r}; expected {expected}", option=option)


def _options(address: str, timeout: float, headers: Mapping[str, str] | None) -> dict[str, Any]:
    if not address.lower().startswith(("http://", "https://")):
        raise _option_error("address", address, "an address like http://127.0.0.1:5000")
    if not timeout > 0:
        raise _option_error("timeout", timeout, "more than 0 seconds")
    return {
        "base_url": address.removesuffix("/invocations"),
        "timeout": httpx.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS), pool=None),
        "headers": headers,
        "verify": address.lower().startswith("https"),  # reading the certificates takes 20 ms
        # As many connections as there are threads that call: the server queues, not the client.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
    }


def _body(request: wire.Request) -> dict[str, Any]:
    return {"content": request.content, "headers": {"content-type": request.content_type}}


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
        f"no server answers after {tries} ({what}); check the address, and that `mlflow models serve` runs there"
    )
