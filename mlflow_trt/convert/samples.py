"""Sample inputs: what ranges are seen on, precisions are calibrated with, and results are compared on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlflow_trt.convert.onnx.batch_axis import count_rows
from mlflow_trt.convert.onnx.model import OnnxModel
from mlflow_trt.convert.resolve_profiles import Profiles
from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.dummy_inputs import make_noise
from mlflow_trt.core.inputs import array_of, prepare_feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import StrEnum, TensorSpec
from mlflow_trt.errors import InputError, InputShapeError

_log = get_logger(__name__)

_ROWS_AT_ONCE = 8
_GENERATED_FEEDS = 2


class SampleOrigin(StrEnum):
    """Where sample inputs are from, in the words that messages use. Noise is no evidence of what real inputs do."""

    CALIBRATION_DATA = "calibration data"
    GIVEN_DATA = "the given data"
    INPUT_EXAMPLE = "the input example"
    GENERATED = "generated noise"
    GOLDEN = "the golden sample"


@dataclass(frozen=True, kw_only=True)
class SampleData:
    """Sample inputs as the user gave them: see `cut_samples` for the forms of `arrays`."""

    arrays: Any
    origin: SampleOrigin


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs of a model, in pieces that run at once. `rows` counts them along the batch axis, where there is one."""

    feeds: tuple[Feeds, ...]
    origin: SampleOrigin
    rows: int

    @property
    def is_evidence(self) -> bool:
        return self.origin is not SampleOrigin.GENERATED

    @property
    def sha256(self) -> str:
        """The digest of every array with its name, dtype and shape, however they were cut into pieces."""
        digest = hashlib.sha256()
        for name in self.feeds[0]:
            for feeds in self.feeds:
                array = feeds[name]
                digest.update(f"{name} {array.dtype.name} {array.shape[1:]};".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def narrowed(self) -> Samples:
        """As a typed model takes them, which has float32 where the source model has float64."""
        with np.errstate(over="ignore"):
            feeds = [
                {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in one.items()}
                for one in self.feeds
            ]
        return replace(self, feeds=tuple(feeds))

    def __str__(self) -> str:
        return f"{self.rows} row{'s' if self.rows != 1 else ''} of {self.origin}"


def cut_samples(data: Any, origin: SampleOrigin, model: OnnxModel, profiles: Profiles) -> Samples:
    """Samples from an array (of a model with one input), a mapping of arrays, or an iterable of such mappings.

    One mapping is cut along the batch axis; each of several stays as it is.

    Raises InputError, with the origin in its text, for missing or unknown names, shapes or dtypes that do not fit the
    model, NaN, and no rows at all.
    """
    try:
        feeds = tuple(_feeds(data, model, profiles))
        rows = sum(_rows(piece, model, profiles) for piece in feeds)
        _check_rows(rows)
    except InputError as error:
        raise type(error)(f"{origin}: {error.message}", tensor=error.tensor) from None
    return Samples(feeds=feeds, origin=origin, rows=rows)


def warn_of_noise(error: InputError) -> None:
    """Say why an input example is passed over: it may be meant for what MLflow makes of it, so that is no failure."""
    _log.warning("Verifying on generated noise, since the model cannot take the input example: %s", error.message)


def generate_samples(model: OnnxModel, profiles: Profiles) -> Samples:
    """Noise of the usual shapes: see `make_noise`."""
    feeds = []
    for seed in range(_GENERATED_FEEDS):
        random = np.random.default_rng(seed)
        feeds.append({spec.name: make_noise(spec, profiles.profiles, random) for spec in model.inputs})
    rows = sum(_rows(piece, model, profiles) for piece in feeds)
    return Samples(feeds=tuple(feeds), origin=SampleOrigin.GENERATED, rows=rows)


def _feeds(data: Any, model: OnnxModel, profiles: Profiles) -> Iterator[Feeds]:
    if isinstance(data, np.ndarray):
        if len(model.inputs) != 1:
            names = ", ".join(spec.name for spec in model.inputs)
            raise InputError(f"this model has several inputs ({names}); give a mapping that names them")
        data = {model.inputs[0].name: data}
    if isinstance(data, Mapping):
        yield from _cut(data, model, profiles)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        yield from (_checked(one, model.inputs) for one in data)
    else:
        raise InputError(f"got a {type(data).__name__}; expected arrays by name, or an iterable of such mappings")


def _check_rows(rows: int) -> None:
    if not rows:
        raise InputError("there are no rows in it")


def _checked(feeds: Any, specs: Sequence[TensorSpec]) -> Feeds:
    if not isinstance(feeds, Mapping):
        raise InputError(f"got a {type(feeds).__name__} in the iterable; expected a mapping from input names to arrays")
    prepared = prepare_feeds(feeds, specs)
    for name, array in prepared.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise InputError(f"input {name!r} has {int(np.isnan(array).sum())} NaN values", tensor=name)
    return prepared


def _cut(data: Mapping[str, Any], model: OnnxModel, profiles: Profiles) -> Iterator[Feeds]:
    """The mapping in pieces along axis 0 of the inputs that carry the batch."""
    carriers, size = _batch(model, profiles)
    if not carriers or any(name not in data for name in carriers):
        yield _checked(data, model.inputs)
        return
    arrays = {name: array_of(value, name) for name, value in data.items()}
    counts = {name: len(arrays[name]) if arrays[name].ndim else 0 for name in carriers}
    rows = counts[carriers[0]]
    for name, count in counts.items():
        if count != rows:
            raise InputShapeError(f"input {name!r} has {count} rows, but {carriers[0]!r} has {rows}", tensor=name)
    fixed = profiles.batch_axis is None
    if fixed and rows % size:
        raise InputShapeError(
            f"input {carriers[0]!r} has {rows} rows, but the model takes {size} at a time; give a multiple of that",
            tensor=carriers[0],
        )
    for start in range(0, rows, size):
        piece = {name: array[start : start + size] if name in carriers else array for name, array in arrays.items()}
        yield _checked(piece, model.inputs)


def _batch(model: OnnxModel, profiles: Profiles) -> tuple[tuple[str, ...], int]:
    """The inputs that are cut, and into how many rows; none where rows may depend on each other."""
    axis = profiles.batch_axis
    if axis is not None:
        if not axis.splits:
            return (), 0
        usual = profiles.profiles[0].ranges[axis.inputs[0]].opt[0] if profiles.profiles else _ROWS_AT_ONCE
        return axis.inputs, usual
    leading = {spec.name: spec.shape[0] for spec in model.inputs if spec.shape}
    sizes = {size for size in leading.values() if isinstance(size, int)}
    if len(sizes) != 1 or len(leading) != len(model.inputs) or not all(isinstance(s, int) for s in leading.values()):
        return (), 0
    return tuple(leading), max(sizes.pop(), 1)


def _rows(feeds: Feeds, model: OnnxModel, profiles: Profiles) -> int:
    axis = profiles.batch_axis
    if axis is not None:
        return len(feeds[axis.inputs[0]])
    return count_rows(model, {name: array.shape for name, array in feeds.items()})
