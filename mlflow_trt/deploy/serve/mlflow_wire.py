"""MLflow's own wire, `/invocations`, for clients that speak it."""

from __future__ import annotations

import traceback
from typing import NamedTuple

from mlflow import pyfunc
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from mlflow.pyfunc.scoring_server import CONTENT_TYPES

from mlflow_trt.core.wire import PARQUET
from mlflow_trt.deploy.serve.parquet_size import check_unpacked
from mlflow_trt.deploy.serve.problems import Cause, HttpError
from mlflow_trt.deploy.serve.served_model import ServedModel
from mlflow_trt.errors import InputError


class Invoked(NamedTuple):
    """MLflow's answer."""

    body: bytes
    kind: bytes


def invoke(model: ServedModel, body: memoryview, content_type: bytes, most_bytes: int) -> Invoked:
    """What MLflow's scoring server answers. Takes milliseconds, so it is for a thread of its own.

    Raises HttpError for another content type and for a table that unpacks to more than `most_bytes`, and what MLflow
    and the model raise: MlflowException with the status that it stands for.
    """
    try:
        kind = content_type.decode("ascii")
    except UnicodeDecodeError:
        kind = ""
    if not kind.partition(";")[0].strip():
        raise HttpError(415, Cause.BAD_REQUEST, f"the content type is missing; expected one of {CONTENT_TYPES}")
    if kind.partition(";")[0].strip().lower() == PARQUET:
        check_unpacked(body, most_bytes)
    schema = model.pyfunc.metadata.get_input_schema()
    try:
        answer = scoring_server.invocations(bytes(body), kind, model.pyfunc, schema)
    except MlflowException:
        raise
    except Exception as error:
        if isinstance(error.__context__, InputError):  # which MLflow could not tell, since it quotes the data
            raise error.__context__ from error
        if not _reached_model(error):
            raise HttpError(400, Cause.BAD_REQUEST, f"the body cannot be read: {type(error).__name__}") from error
        raise
    if answer.status >= 400:  # a content type of others
        raise HttpError(answer.status, Cause.BAD_REQUEST, answer.response)
    return Invoked(answer.response.encode(), answer.mimetype.encode())


def _reached_model(error: BaseException) -> bool:
    """Whether an error was raised in the model, and not where MLflow read the body."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == pyfunc.__name__ for frame in frames)
