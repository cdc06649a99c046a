"""Measures how far outputs are from a reference, sample after sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from mlflow_trt.core.accuracy import Comparison, OutputComparison, Tolerance
from mlflow_trt.core.arrays import Array
from mlflow_trt.core.row_errors import RowErrors
from mlflow_trt.core.types import BatchAxis

_VARIES = 1e-3
"""A reference varies if its standard deviation is more than this share of its largest magnitude."""

_EXACT_BYTES = 4
"""Integers of so many bytes are classes, tokens, indices or counts; smaller ones are pixels, or quantized values."""


def compare(
    subject: str,
    inputs: str,
    pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]],
    tolerance: Tolerance,
    *,
    batch_axis: BatchAxis | None = None,
) -> Comparison:
    """Compare pairs of (outputs, reference), one for each sample. Raises ValueError where their names differ.

    Along a `batch_axis` that splits, each row is judged by itself as well; else each sample is.
    """
    by_row = batch_axis is not None and batch_axis.splits
    totals: dict[str, _Totals] = {}
    for actual, reference in pairs:
        if actual.keys() != reference.keys():
            raise ValueError(f"the outputs are {', '.join(actual)}; expected {', '.join(reference)}")
        for name, expected in reference.items():
            totals.setdefault(name, _Totals(by_row=by_row)).add(actual[name], expected, tolerance)
    return Comparison(
        subject=subject,
        inputs=inputs,
        tolerance=tolerance,
        outputs=tuple(total.result(name) for name, total in totals.items()),
    )


class _Totals:
    """Sums over samples, so that a long series of them need not be kept."""

    def __init__(self, *, by_row: bool) -> None:
        self.by_row = by_row
        self.row_errors = RowErrors()
        self.is_float = True
        self.values = self.nans = self.infinities = self.lost_infinities = self.other_shapes = 0
        self.largest = self.magnitude = 0.0
        self.difference = self.squares = self.reference_squares = self.actual_squares = self.product = self.sum = 0.0
        self.rows = self.agreeing = self.clear = self.clear_agreeing = 0
        self.classes: int | None = None

    def add(self, actual: Array, reference: Array, tolerance: Tolerance) -> None:
        if actual.shape != reference.shape:  # a size that depends on the data, such as the number of boxes found
            self.other_shapes += 1
            return
        # Those of ml_dtypes, such as bfloat16, are of kind V.
        self.is_float = np.dtype(reference.dtype).kind in "fV"
        got, wanted = actual.astype(np.float64), reference.astype(np.float64)
        if not wanted.size:
            return
        finite = np.isfinite(wanted)
        usable = finite & np.isfinite(got)
        if self.is_float:
            self._add_classes(got, wanted, tolerance)
        elif reference.dtype.kind == "b" or reference.dtype.itemsize >= _EXACT_BYTES:
            self._add_exact(actual == reference)
        values = int(np.count_nonzero(usable))
        if values < wanted.size:
            self.nans += int((np.isnan(got) & finite).sum())
            self.infinities += int((np.isinf(got) & finite).sum())
            self.lost_infinities += int((np.isinf(wanted) & (got != wanted)).sum())
            got, wanted = np.where(usable, got, 0), np.where(usable, wanted, 0)  # which adds nothing to any sum
        difference = np.asarray(got - wanted)  # of arrays without an axis, numpy makes a number
        self.row_errors.add(difference, wanted, usable, by_row=self.by_row)
        error = np.abs(difference, out=difference).ravel()
        got, wanted = got.ravel(), wanted.ravel()
        self.values += values
        self.largest = max(self.largest, float(error.max()))
        self.magnitude = max(self.magnitude, float(wanted.max()), -float(wanted.min()))
        self.difference += float(error.sum())
        self.squares += float(error @ error)
        self.reference_squares += float(wanted @ wanted)
        self.actual_squares += float(got @ got)
        self.product += float(got @ wanted)
        self.sum += float(wanted.sum())

    def _add_exact(self, equal: npt.NDArray[np.bool_]) -> None:
        count = int(np.count_nonzero(equal))
        self.rows += equal.size
        self.agreeing += count
        self.clear += equal.size
        self.clear_agreeing += count

    def _add_classes(self, got: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64], tolerance: Tolerance) -> None:
        classes = class_count(wanted)
        if classes is None or self.classes not in (None, classes):
            return
        self.classes = classes
        got, wanted = got.reshape(-1, classes), wanted.reshape(-1, classes)
        first = wanted.argmax(axis=1)[:, None]
        agreeing = got.argmax(axis=1) == first[:, 0]
        best = np.take_along_axis(wanted, first, axis=1)[:, 0]
        others = wanted.copy()
        np.put_along_axis(others, first, -np.inf, axis=1)
        second = others.max(axis=1)
        clear = best - second > 2 * (tolerance.relative_error or 0) * np.abs(best)
        self.rows += len(wanted)
        self.agreeing += int(agreeing.sum())
        self.clear += int(clear.sum())
        self.clear_agreeing += int((agreeing & clear).sum())

    def result(self, name: str) -> OutputComparison:
        count = max(self.values, 1)
        variance = self.reference_squares / count - (self.sum / count) ** 2
        scale = math.sqrt(self.reference_squares)
        norms = scale * math.sqrt(self.actual_squares)
        error = math.sqrt(self.squares)
        rows = self.row_errors.summary()
        return OutputComparison(
            name=name,
            values=self.values,
            max_abs_error=self.largest,
            mean_abs_error=self.difference / count,
            relative_error=error / scale if scale else error,
            cosine_similarity=self.product / norms if norms else float(error == 0),
            nans=self.nans,
            infinities=self.infinities,
            lost_infinities=self.lost_infinities,
            other_shapes=self.other_shapes,
            varies=self.values == 1 or math.sqrt(max(variance, 0)) > _VARIES * self.magnitude > 0,
            classes=self.classes,
            top_class_agreement=self.agreeing / self.rows if self.rows else None,
            clear_agreement=self.clear_agreeing / self.clear if self.clear else None,
            rows=rows.rows,
            median_row_error=rows.median,
            worst_row_error=rows.worst if self.is_float else None,
        )


def class_count(scores: npt.NDArray[np.float64]) -> int | None:
    """The length of the last axis where an output looks like scores of classes, else None.

    Two dimensions, rows by classes, look like it; so does any tensor whose last axis holds probabilities that sum to 1.
    Scores may be minus infinity, which is how classes are masked.
    """
    if scores.ndim < 2 or scores.shape[-1] < 2 or not scores.size or not (scores < np.inf).all():
        return None
    if scores.ndim == 2:
        return int(scores.shape[-1])
    sums_to_one = scores.min() >= 0 and np.allclose(scores.sum(axis=-1), 1, atol=1e-3)
    return int(scores.shape[-1]) if sums_to_one else None
