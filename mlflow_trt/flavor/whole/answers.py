"""Compare the answers of two whole models: texts and labels, numbers, columns, index, dtypes and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mlflow_trt.core.arrays import Array

_FLOATS = (float, np.floating)
_VISIBLE = 1e-3
"""Numbers that are smaller than this share of the largest beside them are not compared by their own size."""


def differences(answer: Any, expected: Any, tolerance: float, where: str = "the answer") -> Iterator[str]:
    """What is different, each in words that name the place.

    Numbers may be off by `tolerance`, of the largest one of a column or array. Texts are equal, but for rows in which
    all numbers agree: there, two labels were too close to each other to tell.
    """
    if type(answer) is not type(expected):
        yield f"{where} is a {type(answer).__name__}, where the source gives a {type(expected).__name__}"
        return
    for kinds, compare in _BY_KIND.items():
        if isinstance(expected, kinds):
            yield from compare(answer, expected, tolerance, where)
            return
    if hasattr(expected, "detach"):  # a tensor
        yield from _of_arrays(answer.detach().cpu().numpy(), expected.detach().cpu().numpy(), tolerance, where)
    elif answer != expected:
        yield f"{where} is {answer!r}, where the source gives {expected!r}"


@dataclass
class Tally:
    """Numbers and texts of pairs of answers that have no `differences`."""

    numbers: int = 0
    largest_error: float = 0.0
    texts: int = 0
    equal: int = 0

    def count(self, answer: Any, expected: Any) -> None:
        """Count what is in an answer, by columns and arrays."""
        if isinstance(expected, str):
            self.texts += 1
            self.equal += answer == expected
        elif isinstance(expected, (pd.DataFrame, Mapping)):
            for name in expected:
                self.count(answer[name], expected[name])
        elif isinstance(expected, pd.Series):
            self.count(answer.to_numpy(), expected.to_numpy())
        elif hasattr(expected, "detach"):
            self.count(answer.detach().cpu().numpy(), expected.detach().cpu().numpy())
        elif isinstance(expected, (list, tuple)) or _is_of_objects(expected):
            if len(expected) and all(isinstance(one, _FLOATS) for one in expected):
                answer, expected = [np.asarray(answer, float)], [np.asarray(expected, float)]
            for one, other in zip(answer, expected, strict=True):
                self.count(one, other)
        elif isinstance(expected, _FLOATS) or (isinstance(expected, np.ndarray) and expected.dtype.kind in "fc"):
            self._measure(np.asarray(answer), np.asarray(expected))

    def _measure(self, answer: Array, expected: Array) -> None:
        self.numbers += expected.size
        largest = float(np.nanmax(np.abs(expected), initial=0.0))
        off = float(np.nanmax(np.abs(answer.astype(np.complex128) - expected.astype(np.complex128)), initial=0.0))
        self.largest_error = max(self.largest_error, off / (largest or 1.0))


def _is_of_objects(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "OUT"


def _of_frames(answer: pd.DataFrame, expected: pd.DataFrame, tolerance: float, where: str) -> Iterator[str]:
    if list(answer.columns) != list(expected.columns):
        yield f"{where} has the columns {list(answer.columns)}, where the source has {list(expected.columns)}"
        return
    if not answer.index.equals(expected.index):
        yield f"{where} has another index than that of the source"
        return
    if not answer.dtypes.equals(expected.dtypes):
        yield f"{where} has the dtypes {answer.dtypes.to_dict()}, where the source has {expected.dtypes.to_dict()}"
        return
    numbers = [name for name in expected if expected[name].dtype.kind == "f"]
    agree = np.ones(len(expected), bool)
    for name in numbers:
        close = _close(answer[name].to_numpy(), expected[name].to_numpy(), tolerance)
        agree &= close
        for row in np.flatnonzero(~close)[:1]:
            yield (
                f"{where}, column {name!r}, row {row}: {answer[name].iloc[row]!r}, where the source gives "
                f"{expected[name].iloc[row]!r}"
            )
    for name in expected:
        if name in numbers:
            continue
        for row, (one, other) in enumerate(zip(answer[name], expected[name], strict=True)):
            is_tie = bool(numbers) and agree[row] and isinstance(other, str)
            if not is_tie:
                yield from differences(one, other, tolerance, f"{where}, column {name!r}, row {row}")


def _of_arrays(answer: Any, expected: Any, tolerance: float, where: str) -> Iterator[str]:
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        yield (
            f"{where} is an array {answer.dtype}{list(answer.shape)}, where the source gives "
            f"{expected.dtype}{list(expected.shape)}"
        )
    elif expected.dtype.kind in "fc":
        # By its own rule, not value by value: an embedding is a direction.
        error = np.linalg.norm((answer - expected).astype(np.float64))
        size = np.linalg.norm(expected.astype(np.float64))
        if not error <= tolerance * max(size, np.finfo(np.float32).tiny):
            yield f"{where} is off by {error / max(size, np.finfo(np.float32).tiny):.2g} (relative error)"
    elif expected.dtype == object:
        yield from _of_lists(list(answer), list(expected), tolerance, where)
    elif not (answer == expected).all():
        yield f"{where} has {int((answer != expected).sum())} of {expected.size} values that the source has not"


def _of_mappings(answer: Any, expected: Any, tolerance: float, where: str) -> Iterator[str]:
    if list(answer) != list(expected):
        yield f"{where} has the keys {list(answer)}, where the source has {list(expected)}"
        return
    numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
    agree = all(_close(np.asarray(answer[name]), np.asarray(value), tolerance).all() for name, value in numbers.items())
    for name, value in expected.items():
        if not (numbers and agree and isinstance(value, str)):
            yield from differences(answer[name], value, tolerance, f"{where}[{name!r}]")


def _of_lists(answer: Any, expected: Any, tolerance: float, where: str) -> Iterator[str]:
    if len(answer) != len(expected):
        yield f"{where} has {len(answer)} entries, where the source has {len(expected)}"
        return
    if expected and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in expected):
        close = _close(np.asarray(answer, float), np.asarray(expected, float), tolerance)
        for row in np.flatnonzero(~close)[:1]:
            yield f"{where}[{row}] is {answer[row]!r}, where the source gives {expected[row]!r}"
        return
    for row, (one, other) in enumerate(zip(answer, expected, strict=True)):
        yield from differences(one, other, tolerance, f"{where}[{row}]")


def _close(answer: Any, expected: Any, tolerance: float) -> Any:
    largest = float(np.nanmax(np.abs(expected), initial=0.0))
    least = max(tolerance * largest, _VISIBLE * tolerance)
    return np.isclose(answer, expected, rtol=tolerance, atol=least, equal_nan=True)


def _of_series(answer: Any, expected: Any, tolerance: float, where: str) -> Iterator[str]:
    yield from _of_frames(answer.to_frame("values"), expected.to_frame("values"), tolerance, where)


def _of_numbers(answer: Any, expected: Any, tolerance: float, where: str) -> Iterator[str]:
    if not _close(np.asarray(answer), np.asarray(expected), tolerance).all():
        yield f"{where} is {answer!r}, where the source gives {expected!r}"


_BY_KIND: Mapping[Any, Callable[[Any, Any, float, str], Iterator[str]]] = {
    pd.DataFrame: _of_frames,
    pd.Series: _of_series,
    np.ndarray: _of_arrays,
    Mapping: _of_mappings,
    (list, tuple): _of_lists,
    _FLOATS: _of_numbers,
}
