"""What Triton's Python backend runs for a model that `export-triton --backend mlflow_trt` wrote.

Triton runs this in a process of its own, its stub, which brings `triton_python_backend_utils`. `execute` does not wait:
it hands requests to the session, whose threads put those together that come at the same time, copy the next batch while
the GPU computes, and send each answer by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from mlflow_trt.core.arrays import Array, Feeds, Outputs
from mlflow_trt.core.scoring_server import become_server, explain_crashes
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.errors import ExecutionError, InputError, OutOfMemoryError
from mlflow_trt.flavor.api import load_model
from mlflow_trt.runtime.session import Session

SETTINGS = "load_settings"
"""The parameter in config.pbtxt that has load settings, as JSON."""


class TritonPythonModel:
    """One instance of a model, on one GPU or on the CPU."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model in the version's folder, with every batch size warmed up."""
        become_server("export it with --model-config")
        explain_crashes()
        parameters = json.loads(args["model_config"]).get("parameters", {})
        settings = json.loads(parameters.get(SETTINGS, {}).get("string_value", "{}"))
        if args["model_instance_kind"] == "GPU":
            settings.setdefault("device", int(args["model_instance_device_id"]))
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session: Session = load_model(str(folder), **settings)
        self._inputs = {spec.name: spec for spec in self._session.inputs}
        self._outputs = {spec.name: spec for spec in self._session.outputs}
        triton.Logger.log_info(f"{args['model_name']}: {self._session.description}")

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin with the requests; each is answered when it has run."""
        for request in requests:
            self._begin(request)

    def finalize(self) -> None:
        """Free the GPU, after the requests that run."""
        self._session.close()

    def _begin(self, request: Any) -> None:
        sender = request.get_response_sender()
        wanted = list(request.requested_output_names())
        tensors = [triton.get_input_tensor_by_name(request, name) for name in self._inputs]
        feeds: Feeds = {
            tensor.name(): _shaped(tensor.as_numpy(), self._inputs[tensor.name()]) for tensor in tensors if tensor
        }

        def done(outputs: Outputs | None, failure: Exception | None) -> None:
            """`tensors` stay until then: the arrays are views of memory that Triton shares."""
            tensors.clear()
            sender.send(self._response(outputs, failure, wanted), flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            if isinstance(failure, ExecutionError) and (reason := self._session.broken()) is not None:
                triton.Logger.log_error(f"This process ends, for Triton to begin anew: {reason}")
                os._exit(1)

        try:
            self._session.submit(feeds, done)
        except Exception as error:  # noqa: BLE001  # what does not fit the model; and Triton waits for an answer
            done(None, error)

    def _response(self, outputs: Outputs | None, failure: Exception | None, wanted: Sequence[str]) -> Any:
        if outputs is None:
            return triton.InferenceResponse(error=_error_of(failure))
        tensors = [triton.Tensor(name, _dimensioned(outputs[name])) for name in wanted or self._outputs]
        return triton.InferenceResponse(tensors)


def _shaped(array: Array, spec: TensorSpec) -> Array:
    """Triton has no tensors without dimensions: `[1]` stands for them."""
    return array if spec.shape or array.size != 1 else array.reshape(())


def _dimensioned(array: Array) -> Array:
    return np.ascontiguousarray(array if array.ndim else array.reshape(1))


def _error_of(failure: Exception | None) -> Any:
    """What a client is told, with the status that it stands for."""
    kinds = triton.TritonError
    if isinstance(failure, InputError):
        return kinds(failure.message, kinds.INVALID_ARG)
    if isinstance(failure, OutOfMemoryError):
        return kinds(failure.message, kinds.UNAVAILABLE)
    triton.Logger.log_error(f"A request failed: {failure!r}")
    return kinds(f"the model failed: {failure}", kinds.INTERNAL)
