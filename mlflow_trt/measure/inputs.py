"""Inputs to run a model on: those that the user gives, the model's own example, or made up ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mlflow_trt.core.arrays import Feeds
from mlflow_trt.core.dummy_inputs import make_noise
from mlflow_trt.core.inputs import prepare_feeds
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.types import BatchAxis, ShapeProfile, TensorSpec
from mlflow_trt.errors import InputError, InputShapeError
from mlflow_trt.pipeline.user_samples import arrays_of

_log = get_logger(__name__)


def given_feeds(data: Any, inputs: Sequence[TensorSpec], batch_axis: BatchAxis | None) -> Feeds:
    """What a user gives to run a model on, as its inputs: see `arrays_of` for the forms.

    Raises InputError where it has no array for one of the inputs, or one that does not fit.
    """
    try:
        feeds = prepare_feeds(_by_name(arrays_of(data, inputs), inputs), inputs)
        _check_rows(feeds, batch_axis)
    except InputError as error:
        raise type(error)(f"the given data: {error.message}", tensor=error.tensor) from error
    return feeds


def example_feeds(example: Any, inputs: Sequence[TensorSpec], batch_axis: BatchAxis | None) -> Feeds | None:
    """A model's input example as its inputs. None, with a warning, for one that they cannot be made of."""
    if example is None:
        return None
    if not isinstance(example, (np.ndarray, list, Mapping, pd.DataFrame)):
        _log.warning("Running on generated noise, since the input example is a %s", type(example).__name__)
        return None
    try:
        return given_feeds(example, inputs, batch_axis)
    except InputError as error:
        text = error.message.partition(": ")[2]
        _log.warning("Running on generated noise, since the model cannot take the input example: %s", text)
        return None


def rows_of(feeds: Feeds, batch_axis: BatchAxis | None) -> int:
    """How many rows there are along the batch axis; 1 without one."""
    return len(feeds[batch_axis.inputs[0]]) if batch_axis is not None else 1


def sample(
    rows: int,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[ShapeProfile],
    batch_axis: BatchAxis | None,
    given: Feeds | None = None,
) -> Feeds:
    """Inputs of `rows` rows: the given ones, repeated or cut, or noise: see `make_noise`."""
    random = np.random.default_rng(0)
    batched = batch_axis.inputs if batch_axis is not None else ()
    feeds: Feeds = {}
    for spec in inputs:
        array = make_noise(spec, profiles, random) if given is None else given[spec.name]
        if spec.name in batched and array.ndim:
            array = np.resize(array, (rows, *array.shape[1:])) if len(array) else array
        feeds[spec.name] = np.asarray(array, order="C")
    return feeds


def _by_name(arrays: Any, inputs: Sequence[TensorSpec]) -> Any:
    if not isinstance(arrays, (np.ndarray, list)):
        return arrays
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise InputError(f"it is one array, and this model has several inputs ({names})")
    return {inputs[0].name: arrays}


def _check_rows(feeds: Feeds, batch_axis: BatchAxis | None) -> None:
    if batch_axis is None:
        return
    first, *others = batch_axis.inputs
    rows = len(feeds[first])
    if not rows:
        raise InputShapeError(f"input {first!r} has no rows", tensor=first)
    for name in others:
        if len(feeds[name]) != rows:
            raise InputShapeError(f"input {name!r} has {len(feeds[name])} rows, but {first!r} has {rows}", tensor=name)
