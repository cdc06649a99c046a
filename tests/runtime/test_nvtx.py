"""Ranges for Nsight Systems, which are marked where the environment asks for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import exhaustive

import mlflow_trt

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import nvtx
ranges = []
nvtx.push_range = lambda name, domain: ranges.append([name, domain])
nvtx.pop_range = lambda domain: ranges.append(None)
import numpy, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1], model_config={"runtime": "onnxruntime", "max_batch_delay_ms": 0})
ranges.clear()
model.predict({"x": numpy.ones((3, 16), "float32")})
print(json.dumps(ranges))
"""


def run(folder, value):
    root = Path(mlflow_trt.__file__).parent.parent
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "MLFLOW_TRT_NVTX": value, "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_phases_of_a_call_are_nested(product_folder):
    pytest.importorskip("nvtx", reason="needs the extra nvtx")
    ranges = run(product_folder, "1")
    assert [part and part[0] for part in ranges] == [
        "predict", "run", "check inputs", None, "finish", None, None, None
    ]  # fmt: skip
    assert {part[1] for part in ranges if part} == {"mlflow-trt"}


@pytest.mark.parametrize("value", exhaustive("", "0"))
def test_nothing_is_marked_unless_it_is_asked_for(value, product_folder):
    pytest.importorskip("nvtx", reason="needs the extra nvtx")
    assert run(product_folder, value) == []


def test_without_the_variable_functions_are_what_they_were():
    from mlflow_trt.runtime.session import Session

    assert not hasattr(Session.run, "__wrapped__")
