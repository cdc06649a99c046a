"""The benchmark of the runtime, as far as it goes without a GPU: its model, its words, its pictures."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from repository import ROOT

from benchmarks import in_turns, networks, peers, replicas, runtime
from benchmarks.networks import pictures
from benchmarks.resnet50 import images, resnet50
from mlflow_trt.backends.cuda_driver import probe


@pytest.mark.slow
def test_resnet50_is_valid_and_its_outputs_vary():
    model = resnet50()
    onnx.checker.check_model(model, full_check=True)
    weights = sum(int(np.prod(initializer.dims)) for initializer in model.graph.initializer)
    assert 25.4e6 < weights < 25.7e6  # the paper's 25.5 million parameters
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"image": images(3)})
    assert scores.shape == (3, 1000)
    assert scores.std(axis=0).mean() > 1e-2 * np.abs(scores).max()


@pytest.mark.parametrize(
    ("model", "feeds"),
    [(partial(networks.bert, layers=1), networks.sentences), (networks.detector, lambda n: {"images": pictures(n)})],
    ids=["bert", "detector"],
)
def test_the_other_networks_are_valid_and_their_outputs_vary(model, feeds):
    model = model()
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds(3))
    assert len(found) == 3
    assert np.isfinite(found).all()
    assert found.std(axis=0).max() > 1e-2 * np.abs(found).max()
    # Rows do not depend on each other.
    (alone,) = session.run(None, {name: array[1:2] for name, array in feeds(3).items()})
    assert np.allclose(alone[0], found[1], rtol=1e-3, atol=1e-4)


class TestPeers:
    def test_a_table_of_medians(self, monkeypatch):
        runs = iter([1.0, 5.0, 2.0, 9.0, 3.0, 7.0])
        monkeypatch.setattr(peers, "_in_a_process", lambda *_: {"batch 1, ms": next(runs)})
        found = peers.compare({"resnet50": Path()}, peers=["a", "b"], rounds=3, seconds=0.1)
        assert found == {"resnet50": {"a": {"batch 1, ms": 2.0}, "b": {"batch 1, ms": 7.0}}}
        assert peers.table(found["resnet50"]) == (["what", "batch 1, ms"], [["a", "2"], ["b", "7"]])

    def test_a_peer_that_fails_is_left_out(self, tmp_path, capsys):
        found = peers.compare({"resnet50": tmp_path}, peers=["plain loop"], rounds=2, seconds=0.1)
        assert found == {"resnet50": {}}
        assert capsys.readouterr().err.count("plain loop failed on resnet50") == 1

    def test_what_is_installed(self):
        assert peers.installed("bert")[:2] == ["mlflow-trt, session.run", "mlflow-trt, pyfunc"]
        assert set(peers.installed("resnet50")) <= set(peers.PEERS)


class TestInTurns:
    TIMES = np.array([[1.0, 0.95, 1.06], [2.0, 1.9, 2.12], [1.5, 1.2, 2.4]])
    """Of three rounds: the provider, the session, pyfunc."""

    def test_the_ratio_is_that_within_a_round(self):
        assert in_turns.cells_of(self.TIMES, 1) == ["1.500", "1.200, 0.95 x", "2.120, 1.06 x"]

    def test_a_goal_that_is_missed_is_named(self):
        assert in_turns.cells_of(self.TIMES, 8)[1:] == ["1.200, 0.95 x", "2.120, 1.06 x (goal 1)"]
        assert in_turns.cells_of(self.TIMES[:, [1, 0, 2]], 1)[1:] == [
            "1.500, 1.05 x (goal 1)",
            "2.120, 1.12 x (goal 1.07)",
        ]

    @pytest.mark.skipif(probe().problem is None, reason="there is a GPU, which the benchmark would use")
    def test_without_a_gpu_it_says_so(self):
        with pytest.raises(SystemExit, match="There is no GPU to compare on"):
            in_turns.main()


def test_images_repeat_after_sixty_four():
    some = images(70)
    assert some.shape == (70, 3, 224, 224)
    assert np.array_equal(some[64:], some[:6])
    assert not np.array_equal(some[0], some[1])


@pytest.mark.skipif(probe().problem is None, reason="there is a GPU, which the benchmark would use")
def test_without_a_gpu_it_says_so(capsys):
    assert runtime.main([]) == 2
    assert "there is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (runtime, ["--models", "rec,gpt"], "argument --models: there is no 'gpt'; choose from resnet50, rec, magika"),
        (runtime, ["--cases", "all"], "argument --cases: there is no 'all'; choose from bulk, one, batches"),
        (replicas, ["--model", "gpt"], "argument --model: invalid choice: 'gpt'"),
    ],
)
def test_names_that_nothing_has(command, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", ["fresh", "load"])
def test_parts_tell_which_command_starts_them(part):
    command = [sys.executable, "-m", f"benchmarks.{part}"]
    bare = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert bare.stderr.startswith("usage:")
    told = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search("`python -m benchmarks.(runtime|serving)`, which starts (it|them)", told)


def test_calls_from_threads_are_all_counted():
    calls = []
    times, took = runtime.call_from_threads(lambda: calls.append(1), 4, 0.2)
    assert len(times) == len(calls) > 4
    assert took >= 0.2


ROWS = [
    runtime.Row(model="m", case="bulk", unit="rows/s", limit=200, measured=190, spread=0.01, goal=0.9,
                higher_is_better=True),
    runtime.Row(model="m", case="one", unit="ms", limit=2, measured=3, spread=0.1, goal=1.2),
    runtime.Row(model="m", case="threads", unit="rows/s", limit=100, measured=40, spread=0.1, higher_is_better=True),
]  # fmt: skip


def test_a_row_sums_up_its_values():
    row = runtime.Row.of([3.0, 2.0, 2.4], model="m", case="one", unit="ms", limit=2.0)
    assert (row.measured, row.ratio) == (2.4, 1.2)
    assert row.cells()[3] == "2.4 ± 21%"


def test_goals_are_met_or_not():
    assert [row.met for row in ROWS] == [True, False, None]
    assert ROWS[0].cells()[4:6] == ("0.95", "≥ 0.9 met")
    assert ROWS[1].cells()[4:6] == ("1.50", "≤ 1.2 NOT MET")


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from dataclasses import asdict

    from benchmarks.pictures import draw

    result = {
        "about": {"runtime": "TensorRT"},
        "rows": [asdict(row) | {"ratio": row.ratio} for row in ROWS],
        "alternatives": [{"what": "a loop", "milliseconds": {"1": 1.0, "8": 2.0}}],
    }
    texts = []
    for path in draw(result, tmp_path):
        texts += [element.text for element in ET.parse(path).iter() if element.tag.endswith("text")]
    assert {"m: bulk", "95%", "m: one", "67%", "a loop"} <= set(texts)
