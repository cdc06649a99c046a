"""Calls of MLflow's scoring server: parquet where it fits, else JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import numpy.typing as npt

from mlflow_trt.client.attempts import TRY_AGAIN, Attempts, Steps
from mlflow_trt.core import wire
from mlflow_trt.core.arrays import Outputs


class MlflowCalls:
    """Predicts by MLflow's wire.

    Args:
        attempts: how requests are tried.
        wire_format: `parquet` or `json` to insist on, or `auto`.
        dtypes: of outputs, by name.
    """

    def __init__(self, attempts: Attempts, wire_format: str, dtypes: Mapping[str, npt.DTypeLike]) -> None:
        self._attempts = attempts
        self._wire_format = wire_format
        self._dtypes = dtypes
        self._json_only: set[frozenset[str]] = set()  # inputs that the server did not take as parquet
        self._signature: dict[str, wire.Tensor] | None = None  # None before the server was asked

    def predict(self, inputs: wire.Inputs) -> Steps[Outputs]:
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
        response = yield from self._attempts.answered(request)
        refused = as_parquet and wire.wants_json(response.status_code, response.content)
        if refused and self._wire_format == "auto":
            self._json_only.add(names)
            response = yield from self._attempts.answered(wire.json_request(inputs))
        if response.status_code != httpx.codes.OK:
            raise wire.error_of(response.status_code, response.content)
        return wire.decode_answer(response.content, self._dtypes)

    def invoke(self, data: Any, params: Mapping[str, Any] | None) -> Steps[Any]:
        response = yield from self._attempts.answered(wire.invocation_request(data, params))
        if response.status_code != httpx.codes.OK:
            raise wire.error_of(response.status_code, response.content)
        return wire.predictions_in(response.content)

    def _checked_signature(self, inputs: wire.Inputs) -> Steps[dict[str, wire.Tensor]]:
        """What arrays are compared with, if the server enforces a signature: MLflow shapes rows of a table by it."""
        if self._signature is not None and not wire.misshapen(inputs, self._signature):
            return self._signature
        # Asked again before anything is refused: the server may have another model by now.
        response = yield from self._attempts.answered(wire.signature_request())
        if response.status_code in TRY_AGAIN:
            raise wire.error_of(response.status_code, response.content)
        signature = self._signature = wire.signature_in(response.content)
        wire.check_shapes(inputs, signature)
        return signature
