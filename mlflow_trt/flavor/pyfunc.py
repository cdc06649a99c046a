"""The MLflow face of a session: the forms that `mlflow.pyfunc` passes in and expects back."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow import pyfunc
from mlflow.models import Model

from mlflow_trt.core.arrays import Array
from mlflow_trt.core.frames import feeds_from_frame, frame_from_outputs
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.nvtx import marked
from mlflow_trt.core.progress import show_progress
from mlflow_trt.core.scoring_server import end_server, end_supervisor, explain_crashes, in_server
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.core.wire import SHAPES_KEY, packed
from mlflow_trt.errors import (
    ArtifactError,
    BuildError,
    EngineMismatchError,
    ExecutionError,
    InputError,
    InputTooLargeError,
    OptionError,
    OutOfMemoryError,
    RuntimeUnavailableError,
    SelfTestError,
)
from mlflow_trt.flavor.whole.loading import load_whole, split_config
from mlflow_trt.flavor.whole.self_test import check_whole
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.runtime.session import Session
from mlflow_trt.store.folder import ModelFolder, read_folder
from mlflow_trt.store.load import open_session

_log = get_logger(__name__)

_PERMANENT = (
    ArtifactError,
    BuildError,
    EngineMismatchError,
    OptionError,
    RuntimeUnavailableError,
    SelfTestError,
)
"""What keeps a model from loading, however often it is tried."""


def load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Any:
    """What `mlflow.pyfunc.load_model` and `mlflow models serve` call: the model folder and its load settings.

    A PyfuncModel, or for a whole model what its own flavor gives.
    """
    explain_crashes()
    folder = read_folder(Path(path))
    settings, rest = settings_of(folder, model_config)
    try:
        with show_progress("Loading the model") as progress:
            return pyfunc_of(folder, open_session(folder, settings, progress), settings, rest)
    except _PERMANENT as error:
        end_supervisor(error.message)
        raise


def settings_of(folder: ModelFolder, model_config: Mapping[str, Any] | None) -> tuple[LoadSettings, dict[str, Any]]:
    """The load settings in a `model_config`, and for a whole model the rest, which is its source's.

    Raises OptionError for settings that do not exist, and for plugins that the model itself names.
    """
    ours, theirs = (dict(model_config or {}), {}) if folder.record.whole is None else split_config(model_config)
    if ours.get("plugins"):  # the user's, unless the model brings some
        metadata = Model.load(str(folder.path))
        LoadSettings.check_logged(metadata.flavors[pyfunc.FLAVOR_NAME].get(pyfunc.MODEL_CONFIG))
    return LoadSettings.of(ours), theirs


def pyfunc_of(folder: ModelFolder, session: Session, settings: LoadSettings, config: Mapping[str, Any]) -> Any:
    """What MLflow's pyfunc calls: ours, or that of the source of a whole model. Closes the session where that fails."""
    whole = folder.record.whole
    if whole is None:
        return PyfuncModel(session, settings=settings)
    try:
        folder.check_whole(whole)
        impl = load_whole(folder, session, config)
        if settings.self_test:
            check_whole(folder, whole, impl, session, config)
    except BaseException:
        session.close()
        raise
    return impl


def _in_spark_task() -> bool:
    """Whether a task of Spark asks, which pyspark knows where it is loaded."""
    pyspark = sys.modules.get("pyspark.taskcontext")
    return pyspark is not None and pyspark.TaskContext.get() is not None


class _WithSignature:
    """A method whose signature is at hand. MLflow asks for that of `predict` at every call, and Python makes the one of
    a bound method anew each time.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        signature = inspect.signature(method)
        _, *parameters = signature.parameters.values()
        self._signature = signature.replace(parameters=parameters)

    def __get__(self, instance: object, _owner: type) -> Callable[..., Any]:
        if instance is None:
            return self._method
        bound = functools.partial(self._method, instance)
        bound.__signature__ = self._signature  # type: ignore[attr-defined]
        return bound


class PyfuncModel:
    """Takes a dict of arrays, an array, or a DataFrame; gives a dict of arrays, or for a DataFrame a DataFrame.

    In a task of Spark, an output of numbers in rows is a column for each number, too: `mlflow.pyfunc.spark_udf` looks
    for such columns when it is asked for `array<float>`. Under MLflow's scoring server, `answers="base64"` gives a dict
    of what `wire.packed` makes of each array.
    """

    def __init__(self, session: Session, *, settings: LoadSettings | None = None) -> None:
        settings = settings or LoadSettings()
        self._session = session
        self._packs = settings.answers == "base64"
        self._most_bytes = settings.max_request_bytes
        self._bfloat16 = [spec.name for spec in session.outputs if spec.dtype == "bfloat16"]

    @_WithSignature
    @marked("predict")
    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Run the model. `params` are not for such models, and ignored.

        Raises:
            InputError: the input does not fit the model.
            ExecutionError: the runtime failed; OutOfMemoryError where memory is lacking, on the GPU or the host. Where
                it will fail for ever, MLflow's scoring server ends after answering.
        """
        if params:
            _log.warning("This model takes no params, and ignores %s", ", ".join(map(str, params)))
        if isinstance(data, pd.Series):
            data = data.to_frame()
        if in_server():
            self._check_size(data)
        try:
            outputs = self._run(self._feeds(data))
        except ExecutionError:
            if in_server() and (reason := self._session.broken()) is not None:
                end_server(reason)
            raise
        except MemoryError as error:  # numpy's, which a server would take for the caller's mistake
            raise OutOfMemoryError(f"the host lacks memory: {error}; pass fewer rows at once") from error
        if self._packs and in_server():
            return {name: packed(output) for name, output in outputs.items()}
        if isinstance(data, pd.DataFrame) and SHAPES_KEY not in data.attrs:
            return self._frame(outputs, data.index)
        return outputs

    def get_raw_model(self) -> Session:
        """The session, for `pyfunc_model.get_raw_model()`: its `close()` frees the GPU."""
        return self._session

    @property
    def rt(self) -> Any:
        """ONNX Runtime's own session, by the name that it has in `mlflow.onnx`, where that is the runtime."""
        if isinstance(self._session, OnnxRuntimeSession):
            return self._session.inference_session
        raise AttributeError(f"the model runs on {self._session.description}, not on ONNX Runtime")

    def __reduce__(self) -> NoReturn:
        self._session.__reduce__()

    def _check_size(self, data: Any) -> None:
        size = _bytes_in(data)
        if size > self._most_bytes:
            raise InputTooLargeError(
                f"the request takes {size} bytes, and this server takes {self._most_bytes} at most "
                "(max_request_bytes); send fewer rows"
            )

    def _frame(self, outputs: Mapping[str, Array], index: pd.Index[Any]) -> pd.DataFrame:
        frame = frame_from_outputs(outputs, index)
        if len(outputs) == 1 and _in_spark_task():
            ((name, output),) = outputs.items()
            if output.ndim == 2 and output.shape[1] > 1:
                numbers = [f"{name}[{number}]" for number in range(output.shape[1])]
                return pd.concat([frame, pd.DataFrame(output, index=index, columns=numbers)], axis="columns")
        return frame

    def _feeds(self, data: Any) -> Mapping[str, npt.ArrayLike]:
        if isinstance(data, pd.DataFrame):
            return feeds_from_frame(data, self._session.inputs)
        if isinstance(data, Mapping):
            return data
        if isinstance(data, (np.ndarray, list)):
            if len(self._session.inputs) != 1:
                names = ", ".join(spec.name for spec in self._session.inputs)
                raise InputError(
                    "Unable to map numpy array input to the expected model input. The model has several, "
                    f"{names}: pass a dict or a DataFrame that names them"
                )
            return {self._session.inputs[0].name: data}
        raise InputError(f"expected a dict of arrays, an array or a DataFrame, got {type(data).__name__}")

    def _run(self, feeds: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        # numpy has no bfloat16: JSON, DataFrames and signatures know float32, which holds its every value.
        outputs = self._session.run(feeds)
        for name in self._bfloat16:
            outputs[name] = outputs[name].astype(np.float32)
        return outputs


def _bytes_in(data: Any) -> int:
    """What arrays and tables take in memory; lists of Python's, whose bodies were larger, are not counted."""
    if isinstance(data, pd.DataFrame):
        return sum(_bytes_of_column(data.iloc[:, number]) for number in range(data.shape[1]))
    if isinstance(data, Mapping):
        return sum(map(_bytes_in, data.values()))
    return data.nbytes if isinstance(data, np.ndarray) else 0


def _bytes_of_column(column: pd.Series[Any]) -> int:
    if column.dtype != object:
        return int(column.memory_usage(index=False))
    return sum(len(cell) if isinstance(cell, (bytes, str)) else _bytes_in(cell) for cell in column)
