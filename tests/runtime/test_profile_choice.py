"""Which profile runs what: the decision before the GPU begins."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_trt import InputShapeError
from mlflow_trt.core.types import BatchAxis, InputRange, ShapeProfile
from mlflow_trt.runtime.batching.choose_profile import Choice, choose_profile

AXIS = BatchAxis(inputs=("x",), splits=True, declared=True)


def profile(low, usual, high):
    return ShapeProfile(ranges={"x": InputRange(min=(low, 4), opt=(usual, 4), max=(high, 4))})


SMALL, LARGE = profile(1, 1, 2), profile(2, 32, 64)


def choose(rows, *profiles, width=4, axis=AXIS):
    return choose_profile(profiles, {"x": np.zeros((rows, width))}, axis)


@pytest.mark.parametrize(("rows", "number"), [(1, 0), (2, 0), (3, 1), (64, 1)])
def test_the_nearest_that_fits(rows, number):
    assert choose(rows, SMALL, LARGE) == Choice(number)


@pytest.mark.parametrize(
    ("rows", "profiles", "expected"),
    [
        (65, (SMALL, LARGE), Choice(1, (2, 64))),
        (1, (LARGE,), Choice(0, (2, 64))),
        (0, (SMALL, LARGE), Choice(0, (1, 2))),
        (9, (profile(8, 8, 8),), Choice(0, (8, 8))),
    ],
)
def test_in_pieces_where_only_the_rows_do_not_fit(rows, profiles, expected):
    assert choose(rows, *profiles) == expected


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (AXIS, r"built for x 1x4:1x4:2x4 \(min:opt:max\), and got x \(3, 5\). Send inputs within"),
        (None, "It has no batch axis that could be split; batch= declares one"),
        (BatchAxis(inputs=("x",), splits=False, declared=False), "rows may depend on each other; batch= declares"),
        (BatchAxis(inputs=("x",), splits=False, declared=True), "Not every output carries the batch axis"),
    ],
)
def test_or_an_error_that_names_the_ranges(axis, message):
    with pytest.raises(InputShapeError, match=message):
        choose(3, SMALL, width=5 if axis is AXIS else 4, axis=axis)


def test_inputs_without_rows_must_fit_as_they_are():
    ranges = {"x": SMALL.ranges["x"], "k": InputRange(min=(1,), opt=(3,), max=(10,), is_values=True)}
    profiles = (ShapeProfile(ranges=ranges),)
    feeds = {"x": np.zeros((7, 4)), "k": np.array([10])}
    assert choose_profile(profiles, feeds, AXIS) == Choice(0, (1, 2))
    with pytest.raises(InputShapeError, match=r"k 1:3:10 .* k \(11,\)"):
        choose_profile(profiles, {**feeds, "k": np.array([11])}, AXIS)


def test_a_scalar_value():
    ranges = {"n": InputRange(min=(1,), opt=(2,), max=(4,), is_values=True)}
    assert choose_profile((ShapeProfile(ranges=ranges),), {"n": np.array(3)}, None) == Choice(0)
