from __future__ import annotations

from decimal import Decimal

import ml_dtypes
import numpy as np
import pandas as pd
import pytest

from mlflow_trt import InputDtypeError, InputError, InputShapeError
from mlflow_trt.core.inputs import InputCheck, prepare_feeds
from mlflow_trt.core.types import TensorSpec

IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 2))
IDS = TensorSpec(name="ids", dtype="int32", shape=("batch", None))


def prepared(array, dtype="float32"):
    return prepare_feeds({"x": array}, [TensorSpec(name="x", dtype=dtype, shape=(None,))])["x"]


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([0.1, 1e30, np.inf, -np.inf]), "float32"),
        (np.array([0.1, -3.5], np.float32), "float16"),
        (np.array([0.1, 3.5], np.float16), "float32"),
        (np.array([0.5, 3.5]), "bfloat16"),
        (np.array([0.5, 3.5], ml_dtypes.bfloat16), "float32"),
        (np.array([-(2**31), 2**31 - 1]), "int32"),
        (np.array([0, 255]), "uint8"),
        (np.array([2**40], np.uint64), "int64"),
        (np.array([-5, 2**24]), "float32"),
        (np.array([-(2**63), 2**62]), "float32"),
        (np.array([-(2**31)], np.int32), "bfloat16"),
        (np.array([2**63], np.uint64), "float32"),
        (np.array([0, 200], np.uint8), "float16"),
        (np.array([True, False]), "bool"),
        (np.array([True, False]), "int64"),
        ([1.5, 2.5], "float32"),
        (np.array([2.0, -(2.0**53 - 1)]), "int64"),
        (np.array([2.0, 255], np.float16), "uint8"),
        (np.array([5, 2**53 + 1], object), "int64"),
        (np.array([5, 1.5, True, np.float32(2)], object), "float32"),
        (np.array([Decimal("1.5"), Decimal(3)], object), "float32"),
        (np.array([Decimal(9), Decimal(3)], object), "int64"),
        (pd.array([1, 2], dtype="Int64"), "int64"),
        (np.ma.masked_array([1, 2], [False, False]), "int64"),
    ],
)
def test_converts_where_nothing_is_lost(array, dtype):
    result = prepared(array, dtype)
    assert result.dtype.name == dtype
    assert np.allclose(result.astype(np.float64), np.asarray(array, np.float64), rtol=1e-2, equal_nan=True)


def test_nan_stays_nan():
    assert np.isnan(prepared(np.array([np.nan]))[0])


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.array([1.0, 1e39]), "float32", r"input 'x', row 1: the value at \[1\] is too large for float32"),
        (np.array([70000.0], np.float32), "float16", "is too large for float16"),
        (np.array([2**31]), "int32", r"input 'x', row 0: the value at \[0\] cannot be represented in int32"),
        (np.array([-1]), "uint8", "cannot be represented in uint8"),
        (np.array([256]), "uint8", "cannot be represented"),
        (np.array([-1]), "uint64", "cannot be represented in uint64"),
        (np.array([2**63], np.uint64), "int64", "cannot be represented in int64"),
        (np.array([2**24 + 1]), "float32", "cannot be represented in float32"),
        (np.array([1, 2**63 + 1], object), "float64", r"the value at \[1\] cannot be represented in float64"),
        # No integer equals infinity, but on x86 it is cast to the lowest one, on ARM the highest float to the highest.
        (np.array([-(2**31)], np.int32), "float16", r"the value at \[0\] cannot be represented in float16"),
        (np.array([0, -(2**63)]), "float16", r"the value at \[1\] cannot be represented in float16"),
        (np.array([2**63 - 1]), "float32", "cannot be represented in float32"),
        (np.array([2**64 - 1], np.uint64), "float16", "cannot be represented in float16"),
        (np.array([2**64 - 1], np.uint64), "bfloat16", "cannot be represented in bfloat16"),
        (np.array([2**31 - 1], np.int32), "bfloat16", "cannot be represented in bfloat16"),
        (np.array([2.0, 1.5]), "int64", r"row 1: the value at \[1\] is no whole number, which every int64 is"),
        (np.array([np.nan]), "int64", "is missing or infinite, which no int64 is"),
        (np.array([np.inf], np.float16), "int8", "is missing or infinite, which no int8 is"),
        (np.array([2.0**53 + 2]), "int64", "cannot be represented in int64"),
        # What numpy, and so everything that passes lists on, makes of 2**53 + 1 beside a float, is 2**53.
        ([2**53 + 1, 1.0], "int64", r"the value at \[0\] cannot be represented in int64"),
        ([1.0, -(2**53)], "int64", r"the value at \[1\] cannot be represented in int64"),
        (np.array([2**24 + 1], np.float32), "int32", "cannot be represented in int32"),
        (np.array([2049], np.float16), "int64", "cannot be represented in int64"),
        (np.array([300.0]), "uint8", "cannot be represented in uint8"),
        (np.array([2, 2**70], object), "int64", r"row 1: the value at \[1\] cannot be represented in int64"),
        (np.array([2, 2**70], object), "float32", "cannot be represented in float32"),
        (np.array([1, "2"], object), "int64", "row 1: .* is of type str; expected int64"),
        (pd.array([1, None], dtype="Int64"), "int64", r"row 1: the value at \[1\] is missing"),
        (np.ma.masked_array([1, 2], [False, True]), "int64", r"row 1: the value at \[1\] is missing"),
        (np.array(["2020-01-01"], "M8[s]"), "int64", "is of dtype datetime64"),
        (np.array([1, 0]), "bool", "is of dtype int64; expected bool"),
        (np.array(["cat"]), "float32", "is of dtype <U3; expected float32"),
        (np.array([1.5, None]), "float32", r"row 1: the value at \[1\] is missing"),
    ],
)
def test_refuses_what_would_be_lost(array, dtype, message):
    with pytest.raises(InputDtypeError, match=message) as caught:
        prepared(array, dtype)
    assert caught.value.tensor == "x"
    assert caught.value.get_http_status_code() == 400


def test_the_place_and_not_the_value_is_told():
    spec = TensorSpec(name="x", dtype="float16", shape=("n", 2))
    with pytest.raises(InputDtypeError, match=r"the value at \[2, 1\] is too large for float16") as caught:
        prepare_feeds({"x": np.array([[0, 1], [2, 3], [4, 77123.25]])}, [spec])
    assert "77123" not in str(caught.value)
    with pytest.raises(InputDtypeError, match=r"the value at \[\] cannot be represented in uint8"):
        prepare_feeds({"x": 300}, [TensorSpec(name="x", dtype="uint8", shape=())])


def test_makes_arrays_contiguous_and_keeps_scalars():
    image = np.zeros((2, 4), np.float32).T
    spec = TensorSpec(name="s", dtype="float32", shape=())
    feeds = prepare_feeds({"s": 2.5, "image": image}, [IMAGE, spec])
    assert feeds["image"].flags.c_contiguous
    assert feeds["s"].shape == ()
    assert list(feeds) == ["image", "s"]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("image", InputError, "expected a mapping from input names to arrays, got str"),
        ({}, InputError, r"input 'image' is missing; the model wants image: float32\[batch, 2\]; ids"),
        ({"image": [], "ids": [], "idx": []}, InputError, "there is no input 'idx'"),
        ({"image": np.zeros(2), "ids": np.zeros((1, 1), int)}, InputShapeError, "has 1 dimensions, .*expected 2"),
        ({"image": np.zeros((1, 3)), "ids": np.zeros((1, 1), int)}, InputShapeError, "expected 2 at axis 1"),
        ({"image": np.zeros((1, 2)), "ids": np.zeros((4, 1), int)}, InputShapeError,
         "input 'ids' has 4 where input 'image' has 1; the model calls both 'batch'"),
    ],
)  # fmt: skip
def test_names_and_shapes(inputs, error, message):
    with pytest.raises(error, match=message):
        prepare_feeds(inputs, [IMAGE, IDS])


def test_ragged_lists_are_named():
    with pytest.raises(InputShapeError, match="input 'x' is no regular array"):
        prepared([[1.0, 2.0], [1.0]])


def test_what_needed_nothing_before_passes_as_it_is_and_nothing_else_does():
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    check = InputCheck([spec])
    array = np.ones((2, 3), np.float32)
    for _ in range(3):
        assert check.prepare({"x": array})["x"] is array
    assert check.prepare({"x": np.ones((2, 3), np.float64)})["x"].dtype == np.float32
    turned = np.ones((3, 2), np.float32).T
    assert check.prepare({"x": turned})["x"].flags.c_contiguous
    assert check.prepare({"x": [[1, 2, 3]]})["x"].tolist() == [[1, 2, 3]]
    for bad in ({"x": np.ones((2, 4), np.float32)}, {"y": array}, {"x": array, "y": array}, {}):
        for _ in range(2):
            with pytest.raises(InputError):
                check.prepare(bad)
    values = InputCheck([TensorSpec(name="n", dtype="int32", shape=())])
    assert values.prepare({"n": np.array(3, np.int64)})["n"].dtype == np.int32
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be represented"):
            values.prepare({"n": np.array(1 << 40)})
