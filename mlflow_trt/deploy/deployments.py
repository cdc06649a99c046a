"""The target `mlflow-trt` of `mlflow deployments`: run this server, and ask one that runs.

MLflow finds this module by the entry point `mlflow.deployments`, and takes the one class of clients in it.
"""

from __future__ import annotations

import json
import os
import typing
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pydantic
import requests
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import FEATURE_DISABLED, RESOURCE_DOES_NOT_EXIST

from mlflow_trt.client import Client
from mlflow_trt.core import open_inference as oip
from mlflow_trt.core import tensor_wire, wire
from mlflow_trt.core.frames import feeds_from_frame, frame_from_outputs
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.deploy.serve.limits import Limits
from mlflow_trt.errors import MissingDependencyError, OptionError, ServerError, ServerUnavailableError

if TYPE_CHECKING:
    from mlflow_trt.deploy.serve.server import ServeOptions

_TARGET = "mlflow-trt"
_KEY = "MLFLOW_TRT_API_KEY"
_TIMEOUT = 60.0
_HELP = """\
A model of the flavor mlflow_trt on a server of the Open Inference Protocol.

    mlflow deployments run-local -t mlflow-trt --name NAME -m models:/NAME/1 -C port=8080

serves it on this machine until it is interrupted, as `mlflow-trt serve NAME=models:/NAME/1` does. Options are given
with -C, each as OPTION=VALUE: %s; and model_config with load settings, as JSON.

    client = mlflow.deployments.get_deploy_client("mlflow-trt:http://127.0.0.1:8080")
    client.predict("NAME", {"x": array})["predictions"]

asks a server that runs: `mlflow-trt serve`, or another one of the protocol with binary tensors. Inputs are a dictionary
of arrays, or a DataFrame, which gives a DataFrame back. MLFLOW_TRT_API_KEY in the environment is the server's API key.
What a server serves is decided where it is started: there is nothing to create, update or delete.
"""


def run_local(name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, Any] | None = None) -> None:
    """Serve a model on this machine, until a signal asks to end.

    Args:
        name: what it is called.
        model_uri: any model URI of MLflow.
        flavor: nothing but `mlflow_trt`.
        config: options of the server, by the names of ServeOptions and Limits, as texts or as they are.

    Raises:
        OptionError: the flavor or an option makes no sense; and what loading a model raises.
    """
    if flavor not in {None, "mlflow_trt"}:
        raise OptionError(f"flavor is {flavor!r}; the target {_TARGET} serves mlflow_trt", option="flavor")
    from mlflow_trt.deploy.serve.server import serve

    if not serve([f"{name}={model_uri}"], parse_config(config or {}), lambda text: print(text, flush=True)):  # noqa: T201  # a command
        raise MlflowException("the server ended since its GPU was lost")


def target_help() -> str:
    """What `mlflow deployments help -t mlflow-trt` prints."""
    try:
        options = ", ".join(_option_types())
    except MissingDependencyError as error:
        options = f"those of `mlflow-trt serve` ({error.message})"
    return _HELP % options


def parse_config(config: Mapping[str, Any]) -> ServeOptions:
    """Options of the server from texts, as the command line of MLflow has them. Raises OptionError."""
    values: dict[str, Any] = {}
    types = {**_option_types(), "model_config": dict[str, Any]}
    for key, value in config.items():
        if key not in types:
            raise OptionError(f"config has {key!r}; expected some of {', '.join(types)}", option=key)
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(types[key])
        try:
            is_json = key == "model_config" and isinstance(value, str)
            values[key] = adapter.validate_json(value) if is_json else adapter.validate_python(value)
        except pydantic.ValidationError as error:
            what = error.errors()[0]["msg"]
            raise OptionError(f"config: {key} is {value!r}: {what}", option=key) from None
    from mlflow_trt.deploy.serve.server import ServeOptions

    settings = values.pop("model_config", {})
    limits = {key: values.pop(key) for key in list(values) if key in Limits.__dataclass_fields__}
    return replace(ServeOptions(settings=settings, limits=Limits(**limits)), **values)


class DeploymentClient(BaseDeploymentClient):
    """Asks the server at the address of the target: `mlflow-trt:http://127.0.0.1:8080`."""

    def __init__(self, target_uri: str) -> None:
        super().__init__(target_uri)  # type: ignore[no-untyped-call]  # MLflow's class has no types
        address = target_uri.partition(":")[2]
        key = os.environ.get(_KEY)
        headers = {"x-api-key": key} if key else None
        self._client = Client(address, headers=headers)  # checks the address
        self._headers = headers
        self._by_model: dict[str, Client] = {}
        self._address = address.rstrip("/")
        self._http = requests.Session()
        self._http.headers.update(headers or {})
        weakref.finalize(self, _close, self._client, self._http, self._by_model)  # MLflow's clients are never closed

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> PredictionsResponse:
        """Run a model of the server.

        Args:
            deployment_name: its name, or NAME/VERSION; None for the first, or the only one, of the server.
            inputs: arrays by name of input, or a DataFrame.
            endpoint: the same as deployment_name, which MLflow lets be called so.

        Raises:
            InputError: the inputs do not fit the model; ServerError: it failed, or there is none.
        """
        name = deployment_name or endpoint
        client = self._client
        if name is not None:
            if name not in self._by_model:
                self._by_model[name] = Client(self._address, headers=self._headers, model=name)
            client = self._by_model[name]
        if not isinstance(inputs, pd.DataFrame):
            return Predictions(predictions=client.predict(inputs))
        name = name or str(self.list_deployments()[0]["name"])
        outputs = client.predict(feeds_from_frame(inputs, _specs(self.get_deployment(name))))
        return Predictions(predictions=frame_from_outputs(outputs, inputs.index))

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """The models of the server, each with name, version and state."""
        models: list[dict[str, Any]] = self._ask(tensor_wire.index_request())
        return models

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """A model of the server: its name, versions, inputs and outputs."""
        described: dict[str, Any] = self._ask(tensor_wire.model_request(name))
        return described

    def create_deployment(
        self, name: str, model_uri: str, flavor: Any = None, config: Any = None, endpoint: Any = None
    ) -> dict[str, Any]:
        """Not possible: a server serves what it was started with."""
        raise _decided_elsewhere(f"mlflow-trt serve {name}={model_uri}")

    def update_deployment(
        self, name: str, model_uri: Any = None, flavor: Any = None, config: Any = None, endpoint: Any = None
    ) -> None:
        """Not possible here: a server that follows an alias of the registry loads the version it leads to."""
        raise _decided_elsewhere(f"mlflow-trt serve models:/{name}@ALIAS --follow-aliases 30, and move the alias")

    def delete_deployment(self, name: str, config: Any = None, endpoint: Any = None) -> None:
        """Not possible: end the server."""
        raise _decided_elsewhere("end the process of the server")

    def _ask(self, request: wire.Request) -> Any:
        """What the server tells, as JSON."""
        try:
            response = self._http.request(request.method, f"{self._address}{request.path}", timeout=_TIMEOUT)
        except requests.RequestException as problem:
            raise ServerUnavailableError(f"no server answers ({type(problem).__name__}: {problem})") from problem
        if response.ok:
            return response.json()
        error = wire.error_of(response.status_code, response.content)
        if response.status_code == requests.codes.not_found:
            raise MlflowException(error.message, error_code=RESOURCE_DOES_NOT_EXIST)
        raise error


class Predictions(PredictionsResponse):
    """What a model answered: arrays by name of output, or a DataFrame."""

    def to_json(self, path: str | Path | None = None) -> str | None:
        """As `mlflow models predict` writes it, with numbers in lists; to a file, or as a text."""
        predictions = self["predictions"]
        if isinstance(predictions, pd.DataFrame):
            listed: Any = [
                {name: _listed(cell) for name, cell in row.items()} for row in predictions.to_dict("records")
            ]
        else:
            listed = {name: _listed(array) for name, array in predictions.items()}
        text = json.dumps({"predictions": listed})
        if path is None:
            return text
        Path(path).write_text(text)
        return None


def _option_types() -> dict[str, Any]:
    """The options of the server that have a value of their own, with their types."""
    from mlflow_trt.deploy.serve.server import ServeOptions

    types = {**typing.get_type_hints(ServeOptions), **typing.get_type_hints(Limits)}
    return {name: kind for name, kind in types.items() if name not in {"settings", "limits"}}


def _specs(described: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """The inputs as columns are compared with. Raises ServerError where one is no tensor of numbers."""
    specs = []
    for tensor in described["inputs"]:
        if tensor["datatype"] == oip.BYTES:
            raise ServerError(
                f"input {tensor['name']!r} is of BYTES, which no DataFrame is read for; pass a dictionary"
            )
        shape = tuple(None if size < 0 else size for size in tensor["shape"])
        specs.append(TensorSpec(name=tensor["name"], dtype=oip.dtype_of(tensor["datatype"]).name, shape=shape))
    return tuple(specs)


def _close(client: Client, http: requests.Session, by_model: Mapping[str, Client]) -> None:
    http.close()
    for one in (client, *by_model.values()):
        one.close()


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _decided_elsewhere(advice: str) -> MlflowException:
    return MlflowException(
        f"what a server serves is decided where it is started: {advice}", error_code=FEATURE_DISABLED
    )
