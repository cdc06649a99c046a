"""DataFrames as the inputs and outputs of a model: a column for each tensor, a row for each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlflow_trt.core.arrays import Array, numpy_dtype
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.errors import ExecutionError, InputDtypeError, InputError, InputShapeError


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
        values = _stacked(values, spec)
    row = spec.fixed[1:]
    if values.ndim <= 2 and len(row) != values.ndim - 1 and None not in row:
        try:
            values = values.reshape(len(values), *(size for size in row if size is not None))
        except ValueError:
            raise InputShapeError(
                f"the cells of column {spec.name!r} have the shape {values.shape[1:]}; expected {row}", tensor=spec.name
            ) from None
    return values


def _stacked(values: npt.NDArray[Any], spec: TensorSpec) -> Array:
    try:
        cells = _from_bytes(values, spec) if isinstance(values[0], bytes) else [np.asarray(cell) for cell in values]
        return np.stack(cells)
    except InputError:
        raise
    except TypeError:  # numpy's, for dtypes without a common one
        raise InputDtypeError(
            f"the cells of column {spec.name!r} differ in dtype; expected {spec.dtype} in each", tensor=spec.name
        ) from None
    except ValueError as error:
        raise InputShapeError(f"the cells of column {spec.name!r} differ in shape: {error}", tensor=spec.name) from None


def _from_bytes(cells: npt.NDArray[Any], spec: TensorSpec) -> list[Array]:
    dtype = numpy_dtype(spec.dtype)
    for cell in cells:
        if not isinstance(cell, bytes) or len(cell) % dtype.itemsize:
            raise InputDtypeError(
                f"a cell of column {spec.name!r} has {len(cell)} bytes, which are no whole number of {spec.dtype}"
                if isinstance(cell, bytes)
                else f"the cells of column {spec.name!r} are bytes and {type(cell).__name__}; expected one of both",
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
