"""Calls of a server of the Open Inference Protocol: arrays as they lie in memory, in the dtypes that the model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import numpy.typing as npt

from mlflow_trt.client.attempts import TRY_AGAIN, Attempts, Steps
from mlflow_trt.core import tensor_wire, wire
from mlflow_trt.core.arrays import Outputs

_REFUSED = frozenset({httpx.codes.BAD_REQUEST, httpx.codes.NOT_FOUND})
_NOT_THERE = frozenset({404, 405, 501})  # what servers without the protocol say to its addresses


class OtherServerError(Exception):
    """The server does not speak the protocol with tensors as bytes. `is_final` says that it never will."""

    def __init__(self, status: int, *, is_final: bool) -> None:
        super().__init__(f"GET /v2 was answered with {status}")
        self.is_final = is_final


class TensorCalls:
    """Predicts by the Open Inference Protocol.

    Args:
        attempts: how requests are tried.
        model: which one, as NAME or NAME/VERSION; None for the first, or the only one, that the server has.
        dtypes: of outputs, by name.
    """

    def __init__(self, attempts: Attempts, model: str | None, dtypes: Mapping[str, npt.DTypeLike]) -> None:
        self._attempts = attempts
        self._chosen = model
        self._dtypes = dtypes
        self._model: tensor_wire.Model | None = None  # None before the server was asked

    def predict(self, inputs: wire.Inputs) -> Steps[Outputs]:
        """Raises OtherServerError where the server does not speak it, and what the answer says."""
        arrays = tensor_wire.arrays_of(inputs)
        known = self._model
        response = None
        if known is not None:
            try:
                response = yield from self._run(arrays, known)
            except ValueError:  # InputError; whether it is right is seen below
                response = None
        if response is None or response.status_code in _REFUSED:
            # Asked again before anything is refused: the server may have another model by now, or be another one.
            now = yield from self._ask()
            if response is None or response.status_code == httpx.codes.NOT_FOUND or now != known:
                response = yield from self._run(arrays, now)
        if response.status_code != httpx.codes.OK:
            raise wire.error_of(response.status_code, response.content)
        length = response.headers.get(tensor_wire.HEADER_LENGTH)
        return tensor_wire.decode_answer(response.content, length, self._dtypes)

    def _run(self, arrays: Mapping[str, Any], model: tensor_wire.Model) -> Steps[httpx.Response]:
        """Raises InputError for what does not fit the model, before it is sent."""
        return (yield from self._attempts.answered(tensor_wire.infer_request(arrays, model)))

    def _ask(self) -> Steps[tensor_wire.Model]:
        """What the server has, now."""
        self._model = None
        response = yield from self._attempts.answered(tensor_wire.server_request())
        if response.status_code in TRY_AGAIN:
            raise wire.error_of(response.status_code, response.content)
        server = tensor_wire.described_server(response.content) if response.is_success else None
        if server is None:
            is_final = response.is_success or response.status_code in _NOT_THERE
            raise OtherServerError(response.status_code, is_final=is_final)
        name = self._chosen
        if name is None:
            index = yield from self._well(tensor_wire.index_request())
            name = tensor_wire.default_model(index.content, server)
        described = yield from self._well(tensor_wire.model_request(name))
        self._model = tensor_wire.described_model(name, described.content)
        return self._model

    def _well(self, request: wire.Request) -> Steps[httpx.Response]:
        response = yield from self._attempts.answered(request)
        if not response.is_success:
            raise wire.error_of(response.status_code, response.content)
        return response
