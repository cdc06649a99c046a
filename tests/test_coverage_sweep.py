"""A sample of the sweep over operators; `python tests/coverage_sweep.py` runs all of it."""

from __future__ import annotations

import warnings

import coverage_sweep
import pytest

EXPLAINED = {"refused"}


@pytest.fixture(scope="module")
def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx makes infinities and NaN on purpose
        return coverage_sweep.operator_cases()


def test_what_builds_in_float32_builds_in_16_bits(cases):
    built = 0
    for case in cases[::45]:
        fp32, *others = (coverage_sweep.examine(case, precision) for precision in coverage_sweep.PRECISIONS)
        if fp32.outcome in ("built", "correct"):
            built += 1
            for finding in others:
                assert finding.outcome == fp32.outcome or finding.outcome in EXPLAINED, finding
    assert built >= 8


def test_neighbours_change_nothing_but_are_there(cases):
    case = next(case for case in cases if case.name == "test_relu")
    changed = coverage_sweep._with_neighbours(case.model)
    assert [node.op_type for node in changed.graph.node] == ["Mul", "Relu"]
    assert coverage_sweep.examine(case, "fp16").kept == 0
