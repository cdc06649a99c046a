"""DataFrames as the inputs and outputs of a model: a column for each tensor, a row for each row.

Nothing is cast that would lose something: errors name the column and the row, counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlflow_trt.core.arrays import Array, numpy_dtype
from mlflow_trt.core.inputs import Place, check_bools, convert_array, is_missing
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.core.wire import SHAPES_KEY
from mlflow_trt.errors import InputDtypeError, InputError, InputShapeError


def feeds_from_frame(frame: pd.DataFrame, specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """The inputs that a DataFrame holds: a column for each, or all columns together as the rows of a single input.

    A cell is a number, or a list or an array of the input's shape, nested or flat. Or it is `bytes`: the numbers
    themselves, in the input's dtype, as an uncompressed image is. Columns of one model's inputs in a row that are only
    numbered, from 0, are taken in the order of the inputs, which is how Spark passes columns without names.

    Raises InputError, InputDtypeError and InputShapeError.
    """
    if len(specs) == 1 and _is_one_row(frame, specs[0]):
        return {specs[0].name: _rows(frame, specs[0])}
    if [str(name) for name in frame.columns] == [str(number) for number in range(len(specs))]:
        frame = frame.set_axis([spec.name for spec in specs], axis="columns")
    if not frame.columns.is_unique:
        raise InputError(f"the DataFrame has several columns of one name: {_listed(list(frame.columns))}")
    if frame.columns.nlevels > 1:
        raise InputError(
            f"the columns of the DataFrame have {frame.columns.nlevels} levels of names; expected one: "
            f"{', '.join(spec.name for spec in specs)}"
        )
    missing = [spec.name for spec in specs if spec.name not in frame.columns]
    if missing:
        raise InputError(
            f"the DataFrame has no column {missing[0]!r}; it has {_listed(list(frame.columns))}",
            tensor=missing[0],
        )
    shapes = _recorded_shapes(frame)
    return {spec.name: _column(frame[spec.name], spec, shapes.get(spec.name)) for spec in specs}


def _is_one_row(frame: pd.DataFrame, spec: TensorSpec) -> bool:
    """Whether the columns together are the rows of a model's only input, whatever they are called."""
    if spec.name not in frame.columns:
        return True
    if SHAPES_KEY in frame.attrs:
        return False
    # A column may have the input's name by chance, as in a table with x and y for an input x of two numbers, or of any.
    return spec.fixed[1:] in {(len(frame.columns),), (None,)} and all(map(pd.api.types.is_numeric_dtype, frame.dtypes))


def _rows(frame: pd.DataFrame, spec: TensorSpec) -> Array:
    """All columns as the rows of one input."""
    labels = list(frame.columns)
    if len(labels) == 1:
        return _column(frame.iloc[:, 0].rename(labels[0]), spec, None, of_one=True)  # not numpy's number as its name

    def place(position: tuple[int, ...]) -> str:
        return f"column {labels[position[1]]!r}, row {position[0]}: the value"

    dtypes = set(frame.dtypes)
    if len(dtypes) == 1 and isinstance(dtype := dtypes.pop(), np.dtype) and dtype.kind != "O":
        rows = convert_array(frame.to_numpy(), spec, place)
    else:
        columns = [
            convert_array(_numbers(frame.iloc[:, number], spec), spec, lambda at, number=number: place((at[0], number)))  # type: ignore[misc]
            for number in range(len(labels))
        ]
        rows = np.stack(columns, axis=1) if columns else np.empty((len(frame), 0), numpy_dtype(spec.dtype))
    wanted = spec.fixed[1:]
    if len(wanted) == 1 and wanted[0] in {None, len(labels)}:
        return rows
    if _is_flat_form(len(labels), wanted):
        return _in_rows(rows, wanted)
    raise InputShapeError(
        f"the DataFrame has no column {spec.name!r}, and its {len(labels)} columns ({_listed(labels)}) together are no "
        f"row of {spec}",
        tensor=spec.name,
    )


def _column(column: pd.Series[Any], spec: TensorSpec, shape: list[int] | None, *, of_one: bool = False) -> Array:
    """A column as an array, of the shape that its sender told, if it was told.

    `of_one`: it is all there is, so a cell may be the only number of a row of any length.
    """
    wanted = spec.fixed[1:]
    rows = _cells(column, spec)
    if shape is not None and rows.ndim <= 2 and len(rows) == shape[0] and rows.size == math.prod(shape):
        try:
            return rows.reshape(shape)
        except (ValueError, OverflowError):  # of nothing, with sizes that numpy does not have
            raise InputShapeError(
                f"the sender of column {column.name!r} told a shape that is too large for any array; expected {spec}",
                tensor=spec.name,
            ) from None
    if rows.ndim == 1 and of_one and wanted == (None,):
        return rows.reshape(-1, 1)
    if _fits(rows.shape[1:], wanted):
        return rows
    if rows.ndim <= 2 and _is_flat_form(math.prod(rows.shape[1:]), wanted):
        return _in_rows(rows, wanted)
    raise _misfit(column.name, rows.shape[1:], spec)


def _cells(column: pd.Series[Any], spec: TensorSpec) -> Array:
    """The cells of a column in the input's dtype and in one shape, one above the other."""
    values = _numbers(column, spec)
    if values.dtype.kind != "O":
        return convert_array(values, spec, _place_in(column.name))
    if column.empty:
        return np.zeros((0, *(size or 0 for size in spec.fixed[1:])), numpy_dtype(spec.dtype))
    if isinstance(values[0], bytes):
        return _stacked(_from_bytes(values, column.name, spec), column.name, spec)
    return _stacked([_cell(cell, row, column.name, spec) for row, cell in enumerate(values)], column.name, spec)


def _numbers(column: pd.Series[Any], spec: TensorSpec) -> npt.NDArray[Any]:
    """What a column holds, in numpy's dtype where all of it has one. Raises InputDtypeError for what pandas calls NA.

    A NaN in a column of floats is a float.
    """
    dtype = column.dtype
    if isinstance(dtype, np.dtype):
        return column.to_numpy()
    if isinstance(dtype, pd.CategoricalDtype):
        raise InputDtypeError(f"column {column.name!r} holds categories; expected {spec.dtype}", tensor=spec.name)
    missing = column.isna().to_numpy()
    if missing.any():
        raise InputDtypeError(f"column {column.name!r}, row {int(missing.argmax())} is missing", tensor=spec.name)
    native = getattr(dtype, "numpy_dtype", None)  # of nullable columns, and those of Arrow
    return column.to_numpy(dtype=native if isinstance(native, np.dtype) else object)


def _cell(cell: Any, row: int, column: Any, spec: TensorSpec) -> Array:
    """What a cell holds, in the input's dtype."""
    try:
        array = np.asarray(_plain(cell))
    except ValueError:
        raise InputShapeError(
            f"column {column!r}, row {row}: the lists in the cell differ in length", tensor=spec.name
        ) from None
    if (array.ndim == 0 and is_missing(cell)) or np.ma.is_masked(cell):
        raise InputDtypeError(f"column {column!r}, row {row} is missing", tensor=spec.name)
    if array.dtype.kind in "USM":
        kind = "binary" if array.dtype.kind == "S" else "text" if array.dtype.kind == "U" else "a time"
        raise InputDtypeError(f"column {column!r}, row {row} holds {kind}; expected {spec.dtype}", tensor=spec.name)
    return array


def _stacked(cells: list[Array], column: Any, spec: TensorSpec) -> Array:
    """Cells in the input's dtype, one above the other."""
    shape = cells[0].shape
    other = next((row for row, cell in enumerate(cells) if cell.shape != shape), None)
    if other is not None:
        raise InputShapeError(
            f"the cells of column {column!r} differ in shape: row {other} has {cells[other].shape} and row 0 {shape}",
            tensor=spec.name,
        )
    # Together only what is of one dtype: numpy would make floats of all where one is.
    if len({cell.dtype for cell in cells}) == 1:
        return convert_array(np.stack(cells), spec, _place_in(column))
    return np.stack(
        [
            convert_array(cell, spec, lambda at, row=row: _place_in(column)((row, *at)))  # type: ignore[misc]
            for row, cell in enumerate(cells)
        ]
    )


def _place_in(column: Any) -> Place:
    def place(position: tuple[int, ...]) -> str:
        row, *cell = position
        return f"column {column!r}, row {row}: the value" + (f" at {cell} of the cell" if cell else "")

    return place


def _place_in_cell(column: Any, row: int) -> Place:
    return lambda position: _place_in(column)((row, *position))


def _plain(cell: Any) -> Any:
    """Lists, which numpy can make an array of: from parquet, arrays in arrays come as arrays of objects."""
    if isinstance(cell, np.ndarray) and cell.dtype == object and cell.ndim == 1:
        return [_plain(part) for part in cell]
    return cell


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(dim in {None, size} for dim, size in zip(wanted, shape, strict=True))


def _is_flat_form(count: int, wanted: tuple[int | None, ...]) -> bool:
    """Whether so many numbers in a row are what is wanted, and there is but one way to shape them."""
    return None not in wanted and count == math.prod(size for size in wanted if size is not None)


def _in_rows(rows: Array, wanted: tuple[int | None, ...]) -> Array:
    return rows.reshape(len(rows), *(size for size in wanted if size is not None))


def _misfit(column: Any, shape: tuple[int, ...], spec: TensorSpec) -> InputShapeError:
    what = f"have the shape {shape}" if shape else "are numbers"
    wanted = "(" + ", ".join("?" if size is None else str(size) for size in spec.fixed[1:]) + ")"
    return InputShapeError(
        f"the cells of column {column!r} {what}, as in row 0; expected {wanted}: {spec}", tensor=spec.name
    )


def _listed(labels: list[Any]) -> str:
    shown = [str(label) for label in labels[:10]]
    return ", ".join(shown if len(labels) <= len(shown) else [*shown, "..."])


def _recorded_shapes(frame: pd.DataFrame) -> Mapping[str, list[int]]:
    """What `mlflow_trt.client` says about arrays whose rows it made flat. It comes from outside: believe nothing."""
    told = frame.attrs.get(SHAPES_KEY)
    if not isinstance(told, dict):
        return {}
    return {
        name: shape
        for name, shape in told.items()
        if isinstance(shape, list) and shape and all(type(size) is int and size >= 0 for size in shape)
    }


def _from_bytes(cells: npt.NDArray[Any], column: Any, spec: TensorSpec) -> list[Array]:
    dtype = numpy_dtype(spec.dtype)
    for row, cell in enumerate(cells):
        if not isinstance(cell, bytes):
            raise InputDtypeError(
                f"the cells of column {column!r} are bytes and, in row {row}, {type(cell).__name__}; expected one of "
                "both",
                tensor=spec.name,
            )
        if len(cell) % dtype.itemsize:
            raise InputDtypeError(
                f"column {column!r}, row {row} has {len(cell)} bytes, which are no whole number of {spec.dtype}",
                tensor=spec.name,
            )
    return [
        check_bools(np.frombuffer(cell, dtype), spec, _place_in_cell(column, row)) for row, cell in enumerate(cells)
    ]


def frame_from_outputs(outputs: Mapping[str, Array], index: pd.Index[Any]) -> pd.DataFrame:
    """One row for each row of input, one column for each output; a cell is a number or the row's array.

    Raises InputError where an output has no such rows, so that such a model cannot be asked by a DataFrame.
    """
    columns: dict[str, Any] = {}
    for name, output in outputs.items():
        if output.ndim == 0 or len(output) != len(index):
            raise InputError(
                f"output {name!r} has the shape {output.shape} for {len(index)} rows of input, so it does not fit into "
                "a DataFrame; pass a dict of arrays instead"
            )
        if output.ndim == 1 or output.shape[1:] == (1,):
            columns[name] = output.reshape(-1)
        else:
            columns[name] = pd.Series(list(output), index=index, dtype=object)
    return pd.DataFrame(columns, index=index)
