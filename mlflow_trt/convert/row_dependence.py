"""Measure whether the rows of a batch depend on each other: then a batch can be neither split nor padded.

A graph does not tell: points of a cloud and samples of a spectrogram are rows as well, and exporters call their axis
`batch`. So a few rows run on ONNX Runtime in several arrangements:

1. all together;
2. each at its place among copies of itself. The number of rows is the same, so that sums are made in the same order: a
   row that does not depend on the others has the same outputs to the bit;
3. one by one, and beside a copy of the last one, which is what an engine's batch is filled up with. What depends on the
   number of rows shows there, and so does rounding, which is told apart by its size;
4. more of them in the second arrangement: a dilated convolution over time reaches rows that are far away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.onnx.reference import reference_runner
from mlflow_trt.convert.resolve_profiles import Profiles
from mlflow_trt.convert.samples import Samples
from mlflow_trt.core.arrays import Array, Feeds, Outputs, take_rows
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis, RowDependence
from mlflow_trt.errors import (
    ExecutionError,
    InputError,
    MlflowTrtError,
    RuntimeUnavailableError,
    UnsupportedModelError,
)

_log = get_logger(__name__)

_ROWS = 2
_MANY_ROWS = 16
_MANY_BYTES = 8 * 2**20
"""The most that the inputs of many rows may take, since that tells of the time to run them."""
_SAME_ORDER = 1e-5
"""The relative error of a row above which others had an effect, where all sums were made in the same order."""
_OTHER_ORDER = 5e-2
"""The same where sums were made in another order, which some models amplify to a few per cent."""
_AMPLIFIED = 10
"""How many times the effect of a tiny change of the inputs is still taken for rounding."""
_TINY = {"float16": 1e-3, "float32": 1e-6, "float64": 1e-6}
_SILENT = 1e-2
"""A row is measured against its own norm, or this share of the largest one, whichever is more."""


def check_rows(source: OnnxModel, profiles: Profiles, samples: Samples) -> Profiles:
    """The profiles with what was measured: an axis along which rows depend on each other does not split any more.

    One that the user declared by `batch=` does all the same, which is warned of. Raises UnsupportedModelError for an
    axis that varies by its name alone: the model runs for a single row, and for no more.
    """
    axis = profiles.batch_axis
    if axis is None or not axis.splits:
        return profiles
    try:
        rows = _Rows.measured_on(source, axis, samples)
        dependence = _dependence(rows)
        if dependence is None:
            rows = rows.many(source, axis, samples)
            dependence = _among_copies(rows)
    except (RuntimeUnavailableError, ExecutionError, InputError) as error:
        _check_that_more_than_one_row_runs(source, axis, samples, error)
        return _with_remark(profiles, f"whether rows depend on each other was not measured: {error.message}")
    except _AnswersVaryError:
        return _with_remark(
            profiles,
            "whether rows depend on each other cannot be measured: the model answers the same inputs differently "
            "each time",
        )
    if dependence is None:
        return profiles
    measured = f"{dependence}, measured with {rows.count} rows of {samples.origin} on ONNX Runtime"
    if axis.declared:
        remark = (
            f"batch= says that rows do not depend on each other, but they do: {measured}. Batches are split and padded "
            "all the same, and answers change with it; give the range of this axis with shapes= instead of batch=, and "
            "they are not"
        )
        _log.warning("%s", remark)
    else:
        remark = f"rows depend on each other, so batches are neither split nor padded: {measured}"
    found = replace(axis, splits=axis.declared, dependence=dependence)
    return _with_remark(replace(profiles, batch_axis=found), remark)


def _check_that_more_than_one_row_runs(
    source: OnnxModel, axis: BatchAxis, samples: Samples, error: MlflowTrtError
) -> None:
    feeds = samples.feeds[0]
    rows = len(feeds[axis.inputs[0]])
    if rows < _ROWS:
        return
    try:
        reference_runner(source).run([spec.name for spec in source.outputs], take_rows(feeds, axis, slice(1)))
    except (RuntimeUnavailableError, ExecutionError, InputError):
        return
    raise UnsupportedModelError(
        f"axis 0 of {', '.join(axis.inputs)} varies by what the model declares, but it runs for 1 row and not for "
        f"{rows}: somewhere inside, such as in a Reshape, the number of rows is a constant. Export the model with a "
        f"batch axis that varies, or convert it for one row at a time with batch=1. {error.message}"
    ) from error


class _AnswersVaryError(Exception):
    """The model draws random numbers: nothing can be compared."""


class _Rows:
    """A few rows, different from each other, the source model to run them, and what it makes of all `together`."""

    def __init__(self, model: IsolatedModel, source: OnnxModel, axis: BatchAxis, samples: Samples, count: int) -> None:
        self.count = count
        self._model = model
        self._names = [spec.name for spec in source.outputs]
        self._batched = axis.inputs
        self._feeds = _different_rows(samples, axis.inputs, count)
        self.together = self.run(range(count))

    @classmethod
    def measured_on(cls, source: OnnxModel, axis: BatchAxis, samples: Samples) -> _Rows:
        """As few rows as the model takes: the k largest of all are to be had of k and more."""
        model = reference_runner(source)
        usual = len(samples.feeds[0][axis.inputs[0]])
        try:
            return cls(model, source, axis, samples, _ROWS)
        except (ExecutionError, InputError):
            if usual <= _ROWS:
                raise
            return cls(model, source, axis, samples, usual)

    def many(self, source: OnnxModel, axis: BatchAxis, samples: Samples) -> _Rows:
        """More of them, as far as that does not take long; these where the model does not take more."""
        size = sum(self._feeds[name][0].nbytes for name in self._batched)
        count = min(_MANY_ROWS, _MANY_BYTES // max(size, 1))
        if count <= self.count:
            return self
        try:
            return _Rows(self._model, source, axis, samples, count)
        except (ExecutionError, InputError):
            return self

    def run(self, rows: Iterable[int]) -> Outputs:
        """The outputs for these rows, which may come again, in this order."""
        taken = list(rows)
        return self._run(
            {name: array[taken] if name in self._batched else array for name, array in self._feeds.items()}
        )

    def run_perturbed(self) -> Outputs:
        """All together, from inputs that are off by about as much as rounding is."""
        random = np.random.default_rng(0)
        changed = dict(self._feeds)
        for name, array in self._feeds.items():
            tiny = _TINY.get(array.dtype.name)
            if tiny is not None:
                noise = random.uniform(-tiny, tiny, array.shape)
                changed[name] = (array.astype(np.float64) * (1 + noise)).astype(array.dtype)
        return self._run(changed)

    def _run(self, feeds: Feeds) -> Outputs:
        return self._model.run(self._names, feeds)


def _dependence(rows: _Rows) -> RowDependence | None:
    """That of the arrangement in which rows are off the most."""
    found = [one for one in (_among_copies(rows), _one_by_one(rows), _padded(rows)) if one is not None]
    return max(found, key=lambda one: one.relative_error or 0.0, default=None)


def _among_copies(rows: _Rows) -> RowDependence | None:
    for row in (0, rows.count - 1):
        copies = rows.run([row] * rows.count)
        arrangement = "where copies of a row take the place of the others"
        found = _shape_problem(rows, copies, rows.count, arrangement)
        if found is None:
            found = _beyond(_SAME_ORDER, rows, {row: _taken(copies, [row])}, arrangement)
        if found is not None:
            return found
    return None


def _one_by_one(rows: _Rows) -> RowDependence | None:
    arrangement = "where rows run one by one"
    for row in (0, rows.count - 1):
        try:
            alone = rows.run([row])
        except (ExecutionError, InputError) as error:  # it runs all together
            return RowDependence(output=None, arrangement=arrangement, problem=error.message)
        found = _shape_problem(rows, alone, 1, arrangement) or _beyond(_OTHER_ORDER, rows, {row: alone}, arrangement)
        if found is not None:
            return found
    return None


def _padded(rows: _Rows) -> RowDependence | None:
    arrangement = "beside a copy of the last row"
    last = rows.count - 1
    try:
        padded = rows.run([*range(rows.count), last])
    except (ExecutionError, InputError) as error:
        return RowDependence(output=None, arrangement=arrangement, problem=error.message)
    problem = _shape_problem(rows, padded, rows.count + 1, arrangement)
    if problem is not None:
        return problem
    return _beyond(_OTHER_ORDER, rows, {row: _taken(padded, [row]) for row in range(rows.count)}, arrangement)


def _shape_problem(rows: _Rows, outputs: Outputs, count: int, arrangement: str) -> RowDependence | None:
    for name, array in outputs.items():
        together = rows.together[name]
        if together.shape[:1] != (rows.count,) or array.shape != (count, *together.shape[1:]):
            problem = f"has the shape {array.shape}, and {together.shape} for {rows.count} rows together"
            return RowDependence(output=name, arrangement=arrangement, problem=problem)
    return None


def _beyond(limit: float, rows: _Rows, by_row: Mapping[int, Outputs], arrangement: str) -> RowDependence | None:
    """The worst output of these rows, whose outputs are given one by one, where it is off by more than `limit`."""
    errors = {
        name: max(_row_error(outputs[name], together, row) for row, outputs in by_row.items())
        for name, together in rows.together.items()
    }
    name = max(errors, key=lambda name: errors[name])
    if errors[name] <= limit:
        return None
    if _difference(rows.run(range(rows.count))[name], rows.together[name]) > limit:
        raise _AnswersVaryError
    if limit == _OTHER_ORDER:
        rounding = _difference(rows.run_perturbed()[name], rows.together[name])
        if errors[name] <= _AMPLIFIED * rounding:
            return None
    return RowDependence(output=name, arrangement=arrangement, relative_error=errors[name])


def _taken(outputs: Outputs, rows: list[int]) -> Outputs:
    return {name: array[rows] for name, array in outputs.items()}


def _difference(actual: Array, expected: Array) -> float:
    """The relative error of the worst row."""
    return max((_row_error(actual[row : row + 1], expected, row) for row in range(len(expected))), default=0.0)


def _row_error(actual: Array, together: Array, row: int) -> float:
    """How far one row is from that of all together; infinite where one is finite and the other is not."""
    everything = together.astype(np.float64).reshape(len(together), -1)
    got, wanted = actual.astype(np.float64).reshape(-1), everything[row]
    if (np.isfinite(got) != np.isfinite(wanted)).any():
        return float("inf")
    usable = np.isfinite(wanted)
    largest = np.sqrt((np.where(np.isfinite(everything), everything, 0) ** 2).sum(axis=1)).max()
    scale = max(float(np.linalg.norm(wanted[usable])), _SILENT * float(largest))
    difference = float(np.linalg.norm(got[usable] - wanted[usable]))
    return difference / scale if scale else float(difference > 0)


def _different_rows(samples: Samples, batched: tuple[str, ...], count: int) -> Feeds:
    """The first few rows of the samples that differ; where there are too few, the others are made of those."""
    first = samples.feeds[0]
    rows: list[Feeds] = []
    for row in _single_rows(samples.feeds, batched):
        if not any(all(np.array_equal(row[name], known[name]) for name in batched) for known in rows):
            rows.append(row)
        if len(rows) == count:
            break
    rows += [_variation(rows[0], step) for step in range(1, count - len(rows) + 1)]
    return {**first, **{name: np.stack([row[name] for row in rows]) for name in batched}}


def _single_rows(pieces: Iterable[Feeds], batched: tuple[str, ...]) -> Iterator[Feeds]:
    """The rows of all pieces that go together with the first one, by the names of the inputs that have them."""
    first: Feeds | None = None
    for piece in pieces:
        first = piece if first is None else first
        if any(
            piece[name].shape[1:] != array.shape[1:] if name in batched else not np.array_equal(piece[name], array)
            for name, array in first.items()
        ):
            continue
        for number in range(len(piece[batched[0]])):
            yield {name: piece[name][number] for name in batched}


def _variation(row: Feeds, step: int) -> Feeds:
    """Another row of values that are as valid: those of the row, shifted, and floats of another magnitude."""
    varied: Feeds = {}
    for name, array in row.items():
        shifted = np.roll(array.reshape(-1), step).reshape(array.shape)
        varied[name] = (
            (shifted.astype(np.float64) * 0.5**step).astype(array.dtype) if array.dtype.kind == "f" else shifted
        )
    return varied


def _with_remark(profiles: Profiles, remark: str) -> Profiles:
    return replace(profiles, remarks=(*profiles.remarks, remark))
