"""A call, by whichever wire the server speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from mlflow_trt.client.attempts import Attempts, Steps
from mlflow_trt.client.mlflow_calls import MlflowCalls
from mlflow_trt.client.tensor_calls import OtherServerError, TensorCalls
from mlflow_trt.core import wire
from mlflow_trt.core.arrays import Outputs

WIRE_FORMATS = ("auto", "v2", "parquet", "json")


class Prediction:
    """What one client sends and waits for.

    Raises OptionError for options that make no sense.
    """

    def __init__(
        self,
        *,
        retries: int,
        backoff: float,
        wire_format: str,
        model: str | None,
        output_dtypes: Mapping[str, npt.DTypeLike] | None,
    ) -> None:
        if wire_format not in WIRE_FORMATS:
            raise option_error("wire_format", wire_format, f"one of {', '.join(WIRE_FORMATS)}")
        for option, value in {"retries": retries, "backoff": backoff}.items():
            if value < 0:
                raise option_error(option, value, "0 or more")
        if model is not None and (wire_format not in {"auto", "v2"} or not model.strip("/")):
            raise option_error("model", model, "NAME or NAME/VERSION, which only wire_format='v2' tells a server")
        attempts = Attempts(retries=retries, backoff=backoff)
        dtypes = dict(output_dtypes or {})
        self._tensors = TensorCalls(attempts, model, dtypes) if wire_format in {"auto", "v2"} else None
        self._insists = wire_format == "v2" or model is not None
        self._mlflow = MlflowCalls(attempts, wire_format, dtypes)

    def predict(self, inputs: wire.Inputs) -> Steps[Outputs]:
        if not isinstance(inputs, Mapping) or not inputs:
            from mlflow_trt.errors import InputError

            what = "an empty one" if isinstance(inputs, Mapping) else type(inputs).__name__
            raise InputError(f"expected a mapping from input names to arrays, got {what}")
        tensors = self._tensors
        if tensors is not None:
            try:
                return (yield from tensors.predict(inputs))
            except OtherServerError as error:
                if self._insists:
                    raise _other_server(error) from error
                if error.is_final:
                    self._tensors = None
        return (yield from self._mlflow.predict(inputs))

    def invoke(self, data: Any, params: Mapping[str, Any] | None) -> Steps[Any]:
        return self._mlflow.invoke(data, params)


def option_error(option: str, value: object, expected: str) -> Exception:
    """An OptionError; to import it here would load MLflow."""
    from mlflow_trt.errors import OptionError

    return OptionError(f"{option} is {value!r}; expected {expected}", option=option)


def _other_server(error: OtherServerError) -> Exception:
    from mlflow_trt.errors import ServerError

    return ServerError(
        f"the server does not speak the Open Inference Protocol with binary tensors ({error}); leave out model= and "
        "wire_format= for MLflow's"
    )
