"""A sample of the sweep over operators; `python tests/tools/coverage_sweep.py` runs all of it."""

from __future__ import annotations

import sys
import warnings

import coverage_sweep
import onnx
import pytest
from helpers import needs_release

EXPLAINED = {"refused"}
pytestmark = [needs_release("onnx", "1.23"), pytest.mark.slow]


@pytest.fixture(scope="module")
def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx makes infinities and NaN on purpose
        return coverage_sweep.operator_cases()


@pytest.mark.exhaustive
def test_what_builds_in_float32_builds_in_16_bits(cases):
    built = 0
    for case in cases[::45]:
        fp32, *others = (coverage_sweep.examine(case, precision) for precision in coverage_sweep.PRECISIONS)
        if fp32.outcome in ("built", "correct"):
            built += 1
            for finding in others:
                assert finding.outcome == fp32.outcome or finding.outcome in EXPLAINED, finding
    assert built >= 8


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_output_without_an_axis_is_compared(precision, cases):
    case = next(case for case in cases if case.name == "test_size")
    assert coverage_sweep.examine(case, precision).outcome in ("built", "correct")


@pytest.mark.exhaustive
def test_neighbours_change_nothing_but_are_there(cases):
    case = next(case for case in cases if case.name == "test_relu")
    changed = coverage_sweep._with_neighbours(case.model)
    assert [node.op_type for node in changed.graph.node] == ["Mul", "Relu"]
    assert coverage_sweep.examine(case, "fp16").kept == 0


@pytest.mark.exhaustive
def test_neighbours_of_a_model_whose_initializers_are_inputs(cases):
    case = next(case for case in cases if case.name == "test_scan_sum")
    assert case.model.ir_version < 4
    onnx.checker.check_model(coverage_sweep._with_neighbours(case.model))


@pytest.mark.exhaustive
def test_an_engine_with_outputs_of_other_shapes_is_refused_before_it_is_run(cases, monkeypatch):
    monkeypatch.setattr(coverage_sweep, "_execute", None)
    case = next(case for case in cases if case.name == "test_maxpool_2d_ceil_output_size_reduce_by_one")
    for precision in ("fp32", "fp16"):
        finding = coverage_sweep.examine(case, precision)
        assert finding.outcome == "refused"
        assert "output 'y' has the shape (1, 1, 2, 2)" in finding.detail


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # onnx makes infinities and NaN on purpose
def test_cases_are_named_by_themselves_or_in_files(tmp_path):
    (tmp_path / "names").write_text("test_relu\ntest_abs\n")
    names = coverage_sweep.names_in(["test_abs", str(tmp_path / "names")])
    assert names == ["test_abs", "test_relu"]
    assert coverage_sweep.cases_by_name(names).keys() >= set(names)


def test_a_worker_that_is_silent_for_too_long_is_given_up(tmp_path):
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert coverage_sweep._watched(silent, "", tmp_path / "0.jsonl", 0.5) == "hung"
