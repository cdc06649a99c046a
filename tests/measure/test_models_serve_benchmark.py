"""The benchmark of `mlflow models serve`: a short run of it, and what it makes of what clients see."""

from __future__ import annotations

import json
import subprocess
import sys

import networks
import onnx
import pytest
import typer
from repository import ROOT
from typer.testing import CliRunner

from benchmarks import models_serve
from benchmarks.load import Answer, drive, summarized
from examples.serving import free_port
from mlflow_trt.core import wire

pytestmark = pytest.mark.server


def test_what_clients_see():
    first = [Answer(1.0, 1.1, ""), Answer(1.0, 1.2, "")]
    load = summarized(2, [first, [Answer(11.1, 11.4, ""), Answer(11.2, 12.9, "500: no")]])
    assert (load.clients, load.requests, load.failures, load.problem) == (2, 3, 1, "500: no")
    assert load.requests_per_second == pytest.approx(1.5)
    assert load.p50_ms == pytest.approx(200)


def test_clients_that_nobody_answers():
    request = wire.Request(content=b"", content_type=wire.JSON)
    load = summarized(3, [drive(f"http://127.0.0.1:{free_port()}", request, 3, 0.05)])
    assert load.requests == 0
    assert load.failures >= 3
    assert "ConnectionRefusedError" in load.problem


@pytest.mark.exhaustive
def test_a_short_run(tmp_path):
    onnx.save(networks.product(), tmp_path / "product.onnx")
    options = {
        "model": tmp_path / "product.onnx", "runtime": "onnxruntime", "answers": "base64", "images": "1,3",
        "clients": "1,3", "rounds": "1", "seconds": "0.05", "targets": "floor,mlflow-trt",
        "output": tmp_path / "result.json",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.models_serve"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "times as fast as JSON" in result.stdout
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {(row["target"], row["wire"], row["images"], row["load"]["clients"]) for row in rows} == {
        (target, kind, images, clients)
        for target in ("floor", "mlflow-trt")
        for kind in ("json", "parquet")
        for images in (1, 3)
        for clients in (1, 3)
    }
    assert all(row["load"]["requests"] > 0 and not row["load"]["failures"] for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "missing.onnx"], "missing.onnx does not exist; expected an ONNX file"),
        (["--model", __file__], "test_models_serve_benchmark.py is no ONNX model"),
        (["--wires", "json,xml"], "there is no 'xml'; choose from json, parquet"),
        (["--targets", "triton"], "there is no 'triton'; choose from floor, mlflow-trt, mlflow.onnx"),
        (["--precision", "fp64"], "unknown precision 'fp64'; choose one of fp32"),
        (["--runtime", "numpy"], "runtime is 'numpy'; choose one of tensorrt"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_served(options, message):
    app = typer.Typer()
    app.command()(models_serve.main)
    result = CliRunner().invoke(app, options, env={"COLUMNS": "500"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
