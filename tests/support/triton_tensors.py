"""Arrays as Triton's clients take and give them."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import tritonclient.http as triton
from packaging.version import Version
from tritonclient.utils import np_to_triton_dtype

KNOWS_WHAT_NOTHING_IS = Version(version("tritonclient")) >= Version("2.73")
"""Clients before make float64 of a tensor without elements."""


def inputs_of(feeds, *, binary=True, api=triton):
    """As Triton's client takes them; `binary` may be a set of names."""
    inputs = []
    for name, value in feeds.items():
        array = np.asarray(value)
        made = api.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        is_binary = name in binary if isinstance(binary, set) else binary
        made.set_data_from_numpy(array, binary_data=is_binary)
        inputs.append(made)
    return inputs


def assert_same(answer, expected, names=None):
    for name in names or expected:
        found = answer.as_numpy(name)
        if found.size or KNOWS_WHAT_NOTHING_IS:
            assert found.dtype == expected[name].dtype, name
        assert found.shape == expected[name].shape, name
        assert found.tobytes() == expected[name].tobytes(), name
