"""MLflow's own wire, `/invocations`, for clients that speak it."""

from __future__ import annotations

from typing import NamedTuple

from mlflow.pyfunc import scoring_server
from mlflow.pyfunc.scoring_server import CONTENT_TYPES

from mlflow_trt.deploy.serve.problems import Cause, HttpError
from mlflow_trt.deploy.serve.served_model import ServedModel


class Invoked(NamedTuple):
    """MLflow's answer."""

    status: int
    body: bytes
    kind: bytes


def invoke(model: ServedModel, body: memoryview, content_type: bytes) -> Invoked:
    """What MLflow's scoring server answers. Takes milliseconds, so it is for a thread of its own.

    Raises what MLflow and the model raise: MlflowException with the status that it stands for.
    """
    try:
        kind = content_type.decode("ascii")
    except UnicodeDecodeError:
        kind = ""
    if not kind.partition(";")[0].strip():
        raise HttpError(415, Cause.BAD_REQUEST, f"the content type is missing; expected one of {CONTENT_TYPES}")
    schema = model.pyfunc.metadata.get_input_schema()
    answer = scoring_server.invocations(bytes(body), kind, model.pyfunc, schema)
    return Invoked(answer.status, answer.response.encode(), answer.mimetype.encode())
