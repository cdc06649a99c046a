"""Inputs that are made up, where nobody gave any: to run, compile or time a model on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from mlflow_trt.core.arrays import Array, numpy_dtype
from mlflow_trt.core.types import InputRange, Shape, ShapeProfile, TensorSpec
from mlflow_trt.errors import OutOfMemoryError

_USUAL = 1  # what a dimension gets of which nothing is known


def make_noise(spec: TensorSpec, profiles: Sequence[ShapeProfile], random: np.random.Generator) -> Array:
    """Noise of the usual shape: floats are normally distributed, integers 0 or 1, which is valid almost anywhere.

    A shape tensor has the usual values instead. Raises OutOfMemoryError where this machine has not so much memory.
    """
    limits = next((profile.ranges[spec.name] for profile in profiles if spec.name in profile.ranges), None)
    dtype = numpy_dtype(spec.dtype)
    if limits is not None and limits.is_values:
        return _usual_values(spec, limits)
    shape = usual_shape(spec, limits)
    _check_memory(spec, shape)
    if dtype.kind in "iub":
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape, np.float32).astype(dtype)


def make_zeros(spec: TensorSpec, limits: InputRange | None, rows: int | None = None) -> Array:
    """Zeros of the usual shape, with so many rows where `rows` says it; a shape tensor has the usual values."""
    if limits is not None and limits.is_values:
        return _usual_values(spec, limits)
    shape = usual_shape(spec, limits)
    return np.zeros(shape if rows is None else (rows, *shape[1:]), numpy_dtype(spec.dtype))


def usual_shape(spec: TensorSpec, limits: InputRange | None) -> Shape:
    """The usual shape of an optimization profile; without one every dimension that may vary is 1."""
    return limits.opt if limits is not None else tuple(_USUAL if size is None else size for size in spec.fixed)


def _usual_values(spec: TensorSpec, limits: InputRange) -> Array:
    return np.asarray(limits.opt, numpy_dtype(spec.dtype)).reshape((len(limits.opt),) if spec.shape else ())


def _check_memory(spec: TensorSpec, shape: Shape) -> None:
    needed = math.prod(shape) * max(numpy_dtype(spec.dtype).itemsize, 4)
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise OutOfMemoryError(
            f"input {spec.name!r} takes {needed / 1e9:,.1f} GB in its usual shape {shape}, more memory than this "
            "machine has; give a smaller usual size, the middle one of batch= or shapes="
        )
