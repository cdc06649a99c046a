"""The benchmark of servers: a short run of it, what it makes of what was measured, and a short soak."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from repository import ROOT
from rich.console import Console

from benchmarks.load import Load
from benchmarks.serving import HTTP, IMAGE, MLFLOW, ROW, Measured, goals
from benchmarks.soak import Soak, _report

pytestmark = pytest.mark.server

SERVERS = {
    "mlflow models serve", "mlflow-trt serve", "the same, shared memory", "with front ends",
    "with front ends, shared memory",
}  # fmt: skip


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.exhaustive
def test_a_short_run(tmp_path):
    """Each answer is compared before it is measured."""
    options = [
        "--clients",
        "1,3",
        "--rounds",
        "1",
        "--seconds",
        "0.05",
        "--front-ends",
        "1",
        "--output",
        str(tmp_path / "result.json"),
    ]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["case"], row["target"], row["load"]["clients"]) for row in found["rows"]}
    assert rows == {(case, server, clients) for case in (IMAGE, ROW) for server in SERVERS for clients in (1, 3)}
    assert all(row["load"]["requests"] > 0 and not row["load"]["failures"] for row in found["rows"])
    assert "Goals" in done.stdout
    assert [goal["wanted"] for goal in found["goals"]] == [1, 4]  # of one client; others were not measured
    assert set(found["own_ms"]) == {IMAGE, ROW}


@pytest.mark.exhaustive
def test_options_that_make_no_sense():
    assert "expected nothing or resnet50" in run("--model", "bert").stderr


def measured(case, target, clients, rate):
    load = Load(
        clients=clients, requests=10, failures=0, problem="", requests_per_second=rate, p50_ms=1000 / rate, p99_ms=1
    )
    return Measured(case=case, target=target, load=load, cpu_ms=1)


def test_goals():
    rows = [
        *(measured(IMAGE, MLFLOW, clients, 200) for clients in (8, 64)),
        *(measured(IMAGE, HTTP, clients, 1500) for clients in (8, 64)),
        measured(ROW, MLFLOW, 64, 400),
        measured(ROW, HTTP, 64, 8000),
    ]
    found = {goal.name: (goal.found, goal.wanted) for goal in goals(rows, [], "nothing")}
    assert found == {
        "8 clients, images": (7.5, 6), "64 clients, images": (7.5, 6), "64 clients, rows of 2 kB": (20, 25),
    }  # fmt: skip


@pytest.mark.exhaustive
def test_a_short_soak():
    done = run("--soak", "6")
    assert "0 failed or answered wrongly" in done.stdout, done.stdout + done.stderr
    counts = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines() if line.rsplit(": ", 1)[-1].isdigit())
    assert len(counts) == 7
    assert all(int(count) > 0 for count in counts.values())


@pytest.mark.parametrize(("last", "problems", "well"), [(300, [], True), (400, [], False), (300, ["x"], False)])
def test_what_a_soak_is_judged_by(last, problems, well):
    state = Soak(None)
    state.resident = [mib << 20 for mib in (200, 300, 300, 300, last, last)]
    state.problems = problems
    assert _report(state, 1, Console(quiet=True)) == well
