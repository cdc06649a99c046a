"""The long run of a session: a short one, and that it sees a wrong answer."""

from __future__ import annotations

import itertools
import subprocess
import sys

import networks
import numpy as np
import pytest
from repository import ROOT

import mlflow_trt
from benchmarks.endurance import Case, Endurance, distinct_rows, make_cases


@pytest.fixture
def session(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 8, 64), verify=False)
    with mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime") as session:
        yield session


def test_a_wrong_answer_is_seen(session):
    feeds = {"x": networks.rows(40)}
    rows = distinct_rows(session, feeds, 0.03)
    assert len(rows) > 20
    foreign = [
        Case(case.feeds, other.expected)
        for case, other in itertools.permutations(make_cases(session, feeds, rows), 2)
        if len(case.feeds["x"]) == len(other.feeds["x"]) and not np.array_equal(case.feeds["x"], other.feeds["x"])
    ]
    (tally,) = Endurance(session, foreign, 0.01).run(1, 0.2)
    assert tally.problems
    assert all("away from the right one" in problem for problem in tally.problems)
    assert len(tally.problems) == len(tally.ended)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_short_run():
    command = [sys.executable, "-m", "benchmarks.endurance", "--model", "magika", "--runtime", "onnxruntime"]
    done = subprocess.run(
        [*command, "--seconds", "2", "--threads", "4"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed or were answered wrongly" in done.stdout
    assert "misshapen ones refused" in done.stdout
