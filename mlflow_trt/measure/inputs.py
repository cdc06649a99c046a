"""Inputs to run a model on: those that the user gives, the model's own example, or made up ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.dummy_inputs import make_noise
from mlflow_trt.core.types import BatchAxis, ShapeProfile, TensorSpec


def sample(
    rows: int,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[ShapeProfile],
    batch_axis: BatchAxis | None,
    given: Any = None,
) -> Feeds:
    """Inputs of `rows` rows: the given ones, repeated or cut, and made up ones for the rest.

    `given` is a mapping of arrays, or for a model with one input an array. Made up is noise: see
    `make_noise`.
    """
    random = np.random.default_rng(0)
    batched = batch_axis.inputs if batch_axis is not None else ()
    if given is not None and not isinstance(given, Mapping):
        given = {inputs[0].name: given}
    feeds: Feeds = {}
    for spec in inputs:
        array = None if given is None or spec.name not in given else np.asarray(given[spec.name])
        if array is None:
            array = make_noise(spec, profiles, random)
        if spec.name in batched and array.ndim:
            array = np.resize(array, (rows, *array.shape[1:])) if len(array) else array
        feeds[spec.name] = np.asarray(array, order="C")
    return feeds
