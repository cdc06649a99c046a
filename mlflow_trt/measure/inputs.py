"""Inputs to run a model on: those that the user gives, the model's own example, or made up ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_trt.core.arrays import numpy_dtype
from mlflow_trt.core.types import BatchAxis, ShapeProfile, TensorSpec

Feeds = dict[str, npt.NDArray[Any]]
_USUAL = 1  # what a dimension gets of which nothing is known


def sample(
    rows: int,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[ShapeProfile],
    batch_axis: BatchAxis | None,
    given: Any = None,
) -> Feeds:
    """Inputs of `rows` rows: the given ones, repeated or cut, and made up ones for the rest.

    `given` is a mapping of arrays, or for a model with one input an array. Made up are normally distributed floats, and
    zeros of other types, which are valid where numbers index something.
    """
    random = np.random.default_rng(0)
    batched = batch_axis.inputs if batch_axis is not None else ()
    if given is not None and not isinstance(given, Mapping):
        given = {inputs[0].name: given}
    feeds: Feeds = {}
    for spec in inputs:
        array = None if given is None or spec.name not in given else np.asarray(given[spec.name])
        if array is None:
            array = _made_up(spec, profiles, random)
        if spec.name in batched and array.ndim:
            array = np.resize(array, (rows, *array.shape[1:])) if len(array) else array
        feeds[spec.name] = np.asarray(array, order="C")
    return feeds


def _made_up(spec: TensorSpec, profiles: Sequence[ShapeProfile], random: np.random.Generator) -> npt.NDArray[Any]:
    limits = profiles[0].ranges.get(spec.name) if profiles else None
    dtype = numpy_dtype(spec.dtype)
    if limits is not None and limits.is_values:
        return np.asarray(limits.opt, dtype).reshape((len(limits.opt),) if spec.shape else ())
    shape = limits.opt if limits is not None else tuple(_USUAL if size is None else size for size in spec.fixed)
    if np.dtype(dtype).kind == "f" or spec.dtype == "bfloat16":
        return random.standard_normal(shape, np.float32).astype(dtype)
    return np.zeros(shape, dtype)
