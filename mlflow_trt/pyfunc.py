"""The MLflow face of a session: the forms that `mlflow.pyfunc` passes in and expects back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlflow_trt.artifact import read_folder
from mlflow_trt.dtypes import numpy_dtype
from mlflow_trt.errors import ExecutionError, InputDtypeError, InputError, InputShapeError, OutOfMemoryError
from mlflow_trt.loading import open_session
from mlflow_trt.progress import shown_progress
from mlflow_trt.runtime.session import Session
from mlflow_trt.server import end_server, explain_crashes, in_server
from mlflow_trt.settings import LoadSettings
from mlflow_trt.spec import TensorSpec
from mlflow_trt.wire import packed

Array = npt.NDArray[np.generic]


def load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyfuncModel:
    """What `mlflow.pyfunc.load_model` and `mlflow models serve` call: the model folder and its load settings."""
    explain_crashes()
    folder = read_folder(Path(path))
    settings = LoadSettings.of(model_config)
    with shown_progress("Loading the model") as progress:
        return PyfuncModel(open_session(folder, settings, progress), answers=settings.answers)


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

    Under MLflow's scoring server, `answers="base64"` gives a dict of what `wire.packed` makes of each array.
    """

    def __init__(self, session: Session, *, answers: str = "lists") -> None:
        self._session = session
        self._packs = answers == "base64"
        self._bfloat16 = [spec.name for spec in session.outputs if spec.dtype == "bfloat16"]

    @_WithSignature
    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Run the model. There are no `params`.

        Raises:
            InputError: the input does not fit the model.
            ExecutionError: the runtime failed; OutOfMemoryError where memory is lacking, on the GPU or the host. Where
                it will fail for ever, MLflow's scoring server ends after answering.
        """
        if params:
            raise InputError(f"this model takes no params, and got {', '.join(params)}")
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
        return frame_from_outputs(outputs, data.index) if isinstance(data, pd.DataFrame) else outputs

    def get_raw_model(self) -> Session:
        """The session, for `pyfunc_model.get_raw_model()`: its `close()` frees the GPU."""
        return self._session

    def _feeds(self, data: Any) -> Mapping[str, npt.ArrayLike]:
        if isinstance(data, pd.DataFrame):
            return feeds_from_frame(data, self._session.inputs)
        if isinstance(data, Mapping):
            return data
        if isinstance(data, (np.ndarray, list)):
            if len(self._session.inputs) != 1:
                names = ", ".join(spec.name for spec in self._session.inputs)
                raise InputError(f"this model has several inputs ({names}): pass a dict or a DataFrame that names them")
            return {self._session.inputs[0].name: data}
        raise InputError(f"expected a dict of arrays, an array or a DataFrame, got {type(data).__name__}")

    def _run(self, feeds: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        # numpy has no bfloat16: JSON, DataFrames and signatures know float32, which holds its every value.
        outputs = self._session.run(feeds)
        for name in self._bfloat16:
            outputs[name] = outputs[name].astype(np.float32)
        return outputs


def feeds_from_frame(frame: pd.DataFrame, specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """The inputs that a DataFrame holds: a column for each, or all columns together as the rows of a single input.

    A cell is a number, a list or an array; a flat one is reshaped to the input's fixed dimensions. Or it is `bytes`:
    the numbers themselves, in the input's dtype, as an uncompressed image is.
    """
    if len(specs) == 1 and specs[0].name not in frame.columns:
        return {specs[0].name: frame.to_numpy()}
    if not frame.columns.is_unique:
        raise InputError(f"the DataFrame has several columns of one name: {', '.join(map(str, frame.columns))}")
    missing = [spec.name for spec in specs if spec.name not in frame.columns]
    if missing:
        raise InputError(
            f"the DataFrame has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}",
            tensor=missing[0],
        )
    return {spec.name: _column(frame[spec.name], spec) for spec in specs}


def _column(column: pd.Series[Any], spec: TensorSpec) -> Array:
    values = column.to_numpy()
    if values.dtype == object:
        if column.empty:
            return np.zeros((0, *(size or 0 for size in spec.fixed[1:])), numpy_dtype(spec.dtype))
        cells = _from_bytes(values, spec) if isinstance(values[0], bytes) else [np.asarray(cell) for cell in values]
        try:
            values = np.stack(cells)
        except ValueError as error:
            raise InputShapeError(
                f"the cells of column {spec.name!r} differ in shape: {error}", tensor=spec.name
            ) from None
    row = spec.fixed[1:]
    if values.ndim <= 2 and len(row) != values.ndim - 1 and None not in row:
        try:
            values = values.reshape(len(values), *(size for size in row if size is not None))
        except ValueError:
            raise InputShapeError(
                f"the cells of column {spec.name!r} have the shape {values.shape[1:]}; expected {row}", tensor=spec.name
            ) from None
    return values


def _from_bytes(cells: npt.NDArray[Any], spec: TensorSpec) -> list[Array]:
    dtype = numpy_dtype(spec.dtype)
    wrong = next((cell for cell in cells if not isinstance(cell, bytes) or len(cell) % dtype.itemsize), None)
    if wrong is not None:
        raise InputDtypeError(
            f"a cell of column {spec.name!r} has {len(wrong)} bytes, which are no whole number of {spec.dtype}"
            if isinstance(wrong, bytes)
            else f"the cells of column {spec.name!r} are bytes and {type(wrong).__name__}; expected one of both",
            tensor=spec.name,
        )
    return [np.frombuffer(cell, dtype) for cell in cells]


def frame_from_outputs(outputs: Mapping[str, Array], index: pd.Index[Any]) -> pd.DataFrame:
    """One row for each row of input, one column for each output; a cell is a number or the row's array."""
    columns: dict[str, Any] = {}
    for name, output in outputs.items():
        if output.ndim == 0 or len(output) != len(index):
            raise ExecutionError(
                f"output {name!r} has the shape {output.shape} for {len(index)} rows of input, so it does not fit into "
                "a DataFrame; pass a dict of arrays instead"
            )
        columns[name] = output if output.ndim == 1 else pd.Series(list(output), index=index, dtype=object)
    return pd.DataFrame(columns, index=index)
