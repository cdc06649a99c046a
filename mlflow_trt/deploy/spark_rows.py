"""Rows as Spark hands them over, as inputs of a model; outputs as Spark takes them. Knows pandas, not Spark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mlflow_trt.core.arrays import Array, numpy_dtype
from mlflow_trt.core.inputs import check_bools
from mlflow_trt.core.types import TensorSpec
from mlflow_trt.errors import InputError, InputShapeError
from mlflow_trt.runtime.session import Session

Columns = Mapping[str, "pd.Series[Any]"]

# Arrow has these, and Spark has not.
_WIDER = {"float16": "float32", "bfloat16": "float32", "uint8": "int16", "uint16": "int32", "uint32": "int64"}


class SparkRows:
    """Runs the rows of one partition, and knows which row is to blame."""

    def __init__(self, session: Session, *, partition: int) -> None:
        self._session = session
        self._partition = partition
        self._before = 0

    def run(self, columns: Columns, rows_at_once: int) -> dict[str, Array]:
        """The outputs for a batch of any size, by name.

        Raises InputError, or what a session raises, with the partition and the row, counted from 0, in its text.
        """
        rows = len(next(iter(columns.values())))
        for name, column in columns.items():  # in all of it: a null anywhere makes floats of integers everywhere
            self._check_nulls(name, column)
        results = [
            self._piece({name: column.iloc[start : start + rows_at_once] for name, column in columns.items()}, start)
            for start in range(0, rows, rows_at_once)
        ]
        self._before += rows
        if not results:
            return {
                spec.name: np.zeros((0, *(size or 0 for size in spec.fixed[1:])), numpy_dtype(spec.dtype))
                for spec in self._session.outputs
            }
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    def _piece(self, columns: Columns, start: int) -> dict[str, Array]:
        first = self._before + start
        feeds = {spec.name: self._input(columns[spec.name], spec, first) for spec in self._session.inputs}
        try:
            return self._session.run(feeds)
        except InputError as error:
            for row in range(len(next(iter(feeds.values())))):
                try:
                    self._session.run({name: array[row : row + 1] for name, array in feeds.items()})
                except InputError as its_error:
                    raise type(its_error)(
                        f"{self._place(first + row)}: {its_error.message}", tensor=its_error.tensor
                    ) from None
            raise error from None  # no row by itself

    def _check_nulls(self, name: str, column: pd.Series[Any]) -> None:
        missing = column.isna().to_numpy()
        if missing.any():
            raise InputError(
                f"{self._place(self._before + int(missing.argmax()))}: column {name!r} is null, or NaN, which Spark "
                "hands over alike; leave such rows out: df.dropna(subset=[...])",
                tensor=name,
            )

    def _input(self, column: pd.Series[Any], spec: TensorSpec, first: int) -> Array:
        values = column.to_numpy()
        if values.dtype != object:
            return values.reshape(len(values), 1) if spec.fixed[1:] == (1,) else values
        cells = [self._cell(cell, spec, first + row) for row, cell in enumerate(values)]
        shapes = {cell.shape for cell in cells}
        if len(shapes) > 1:
            row = next(row for row, cell in enumerate(cells) if cell.shape != cells[0].shape)
            raise InputShapeError(
                f"{self._place(first + row)}: column {spec.name!r} has the shape {cells[row].shape} here, and "
                f"{cells[0].shape} before",
                tensor=spec.name,
            )
        return np.stack(cells)

    def _cell(self, cell: Any, spec: TensorSpec, row: int) -> Array:
        """A row of an input: flat, nested or binary, in the shape that the model wants where that is known."""
        wanted = spec.fixed[1:]
        try:
            if isinstance(cell, (bytes, bytearray)):
                array = check_bools(
                    np.frombuffer(cell, numpy_dtype(spec.dtype)),
                    spec,
                    lambda at: f"{self._place(row)}: column {spec.name!r}: the value at {list(at)} of the cell",
                )
            else:
                array = np.asarray(_plain(cell))
            if array.ndim != len(wanted) and None not in wanted:
                array = array.reshape([size for size in wanted if size is not None])
        except InputError:
            raise
        except ValueError as error:
            raise self._misfit(spec, row, f": {error}") from None
        if array.dtype == object:
            kinds = {type(part).__name__ for part in array.flat}
            what = "nulls" if "NoneType" in kinds else f"{', '.join(sorted(kinds))}: cast the column to numbers"
            raise self._misfit(spec, row, f": it has {what}")
        sizes = zip(wanted, array.shape, strict=False)
        if len(wanted) != array.ndim or any(expected not in {None, size} for expected, size in sizes):
            raise self._misfit(spec, row, f", which is of the shape {array.shape}")
        return array

    def _misfit(self, spec: TensorSpec, row: int, why: str) -> InputError:
        return InputShapeError(f"{self._place(row)}: {spec} does not take this row{why}", tensor=spec.name)

    def _place(self, row: int) -> str:
        return f"partition {self._partition}, row {row}"


def columns_of_outputs(outputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> pd.DataFrame:
    """A column for each output; a cell is a number, an array, or lists of arrays, in types that Spark has."""
    columns: dict[str, Any] = {}
    for spec in specs:
        output = outputs[spec.name]
        wider = _WIDER.get(output.dtype.name)
        output = output.astype(wider) if wider else output
        columns[spec.name] = output if output.ndim == 1 else pd.Series(list(_nested(output)), dtype=object)
    return pd.DataFrame(columns)


def _plain(cell: Any) -> Any:
    """Lists, which numpy can make an array of: arrays in arrays come as arrays of objects."""
    if isinstance(cell, np.ndarray) and cell.dtype == object:
        return [_plain(part) for part in cell]
    return cell


def _nested(array: Array) -> Iterator[Any]:
    for row in array:
        yield row if row.ndim <= 1 else list(_nested(row))
