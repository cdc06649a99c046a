"""The rule by which `best` chooses, on numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlflow_trt import Precision
from mlflow_trt.core.selection import Candidate, Fate, Selection, choose, table_row

STEADY = (1.0, 1.01, 0.99, 1.0, 1.0)


def candidate(precision, times, error=1e-3, fate=Fate.PASSED, reason=""):
    return Candidate(
        precision=Precision(precision), fate=fate, reason=reason, engine_error=error, milliseconds=tuple(times)
    )


def times(factor):
    return [factor * time for time in STEADY]


def test_the_fastest_wins_and_the_others_are_slower():
    candidates, winner = choose(
        [candidate("fp32", times(2), 1e-6), candidate("fp16", STEADY), candidate("bf16", times(1.5))]
    )
    assert winner.precision is Precision.FP16
    assert winner.reason == "the fastest: 1 ms against 1.5 ms of bf16"
    assert [one.fate for one in candidates] == [Fate.SLOWER, Fate.WON, Fate.SLOWER]
    assert candidates[0].reason == "2 ms against 1 ms of fp16"


def test_of_those_that_are_as_fast_within_two_percent_the_most_accurate_wins():
    _, winner = choose([candidate("fp32", times(1.015), 1e-6), candidate("fp16", STEADY, 1e-3)])
    assert winner.precision is Precision.FP32
    assert "as fast as fp16 within the noise, 1.015 ms against 1 ms of fp16" in winner.reason
    assert "relative error 1.00e-06 against 1.00e-03 of fp16" in winner.reason
    candidates, winner = choose([candidate("fp32", times(1.03), 1e-6), candidate("fp16", STEADY, 1e-3)])
    assert winner.precision is Precision.FP16
    candidates, _ = choose([candidate("fp16", STEADY, 1e-3), candidate("bf16", times(0.99), 1e-2)])
    assert [one.fate for one in candidates] == [Fate.WON, Fate.LESS_ACCURATE]
    assert "within the noise, and no more accurate" in candidates[1].reason


def test_of_equals_the_wider_format_wins():
    _, winner = choose([candidate("fp16", STEADY), candidate("bf16", STEADY)])
    assert winner.precision is Precision.FP16


def test_noise_is_what_the_rounds_of_two_candidates_differ_by():
    steps = (0.0, 0.3, -0.3, 0.25, -0.2, 0.1, -0.1)
    noisy = [1.1 + step for step in steps]
    _, winner = choose([candidate("fp32", noisy, 1e-6), candidate("fp16", [1.0] * 7, 1e-3)])
    assert winner.precision is Precision.FP32
    # A machine that slows down for all of them alike is no noise.
    slowing = [2.0 + 10 * step for step in range(7)]
    _, winner = choose([candidate("fp32", [1.03 * time for time in slowing], 1e-6), candidate("fp16", slowing, 1e-3)])
    assert winner.precision is Precision.FP16


def test_what_failed_does_not_win_however_fast_it_is():
    candidates, winner = choose(
        [
            candidate("fp32", times(2), 1e-6),
            candidate("fp16", STEADY, 0.5, Fate.FAILED_GATE, "too far off"),
            candidate("bf16", (), None, Fate.NOT_BUILT, "no kernel"),
        ]
    )
    assert winner.precision is Precision.FP32
    assert winner.reason == "the only one that passed, at 2 ms"
    assert [one.reason for one in candidates[1:]] == ["too far off", "no kernel"]
    assert choose([candidate("fp16", STEADY, fate=Fate.FAILED_GATE)]) is None


def test_the_table_and_the_metrics():
    fp16 = replace(candidate("fp16", STEADY), engine_bytes=2_500_000)
    int8 = candidate("int8", (), None, Fate.LEFT_OUT, "no data")
    candidates, winner = choose([candidate("fp32", times(2), 1e-6), fp16, int8])
    selection = Selection(
        winner=winner.precision, reason=winner.reason, measured_on="a GPU", shapes={"x": (4, 16)}, candidates=candidates
    )
    assert table_row(candidates[1]) == ("fp16", "won", "1", "1.00e-03", "2.5", winner.reason)
    assert selection.rows()[2] == ("int8", "left out", "", "", "", "no data")
    assert selection.metrics() == {
        "mlflow_trt/candidates/fp32/latency_ms": pytest.approx(2),
        "mlflow_trt/candidates/fp32/relative_error": 1e-6,
        "mlflow_trt/candidates/fp16/latency_ms": 1.0,
        "mlflow_trt/candidates/fp16/relative_error": 1e-3,
    }
    assert json.dumps(selection.metrics())
