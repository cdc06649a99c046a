"""ONNX files from outside run in a process of their own, which a crash ends, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
from helpers import wait_for
from onnx import helper, numpy_helper
from processes import is_running

import mlflow_trt
from mlflow_trt import UnsupportedModelError
from mlflow_trt.backends import onnxruntime_process
from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.backends.onnxruntime_process import IsolatedModel, calibrated_magnitudes, shared_process
from mlflow_trt.errors import ExecutionError, InputError

pytestmark = pytest.mark.usefixtures("own_processes")

DTYPES = {
    name: helper.np_dtype_to_tensor_dtype(np.dtype(name))
    for name in ("float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool")
}


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save_model(model, path)
    return path


def mean_with_an_empty_input() -> onnx.ModelProto:
    """onnx.checker accepts it, and ONNX Runtime 1.32 reads from an address that is none."""
    nodes = [
        helper.make_node("Mul", ["x", "c0"], ["p0"]),
        helper.make_node("Mul", ["x", "c1"], ["p1"]),
        helper.make_node("Mean", ["p0", "p1", ""], ["y"], name="mean"),
    ]
    values = [networks.value(name, networks.FLOAT, ["batch", 4]) for name in ("x", "y")]
    factors = [numpy_helper.from_array(np.full(4, number + 1, np.float32), f"c{number}") for number in range(2)]
    return networks.model(nodes, values[:1], values[1:], factors)


@pytest.fixture
def product(tmp_path) -> Path:
    return saved(networks.product(), tmp_path / "product.onnx")


@pytest.fixture
def crashing(tmp_path) -> Path:
    return saved(mean_with_an_empty_input(), tmp_path / "crashing.onnx")


def test_a_crash_is_an_error_and_the_next_model_runs(product, crashing):
    x, four = networks.rows(3), np.ones((2, 4), np.float32)
    with shared_process():
        sound = IsolatedModel(product)
        expected = sound.run(["y"], {"x": x})["y"]
        with pytest.raises(ExecutionError, match=r"crashed when it was to run crashing.onnx: .*SIG(SEGV|ABRT|BUS)"):
            IsolatedModel(crashing).run(["y"], {"x": four})
        with pytest.raises(ExecutionError, match="crashed when it was to run crashing.onnx"):
            sound.run(["y"], {"x": x})  # it went with the process
        assert np.array_equal(IsolatedModel(product).run(["y"], {"x": x})["y"], expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_conversion_of_what_crashes_onnxruntime_is_refused(precision, tmp_path):
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime crashed"):
        mlflow_trt.save_model(mean_with_an_empty_input(), tmp_path / "model", precision=precision)
    assert not (tmp_path / "model").exists()


def test_a_conversion_has_one_process(tmp_path, monkeypatch):
    started = []
    start = onnxruntime_process._Child.start
    monkeypatch.setattr(onnxruntime_process._Child, "start", lambda: started.append(start()) or started[-1])
    mlflow_trt.save_model(networks.product(), tmp_path / "model", precision="fp16")
    assert len(started) == 1
    assert started[0].process.returncode == -signal.SIGKILL  # it was ended, and waited for


def test_the_numbers_are_those_of_onnxruntime_in_this_process(tmp_path):
    random = np.random.default_rng(0)
    names = [f"{kind}_{dtype}" for dtype in DTYPES for kind in ("x", "y")]
    model = networks.model(
        [helper.make_node("Identity", [f"x_{dtype}"], [f"y_{dtype}"]) for dtype in DTYPES],
        [networks.value(f"x_{dtype}", number, None) for dtype, number in DTYPES.items()],
        [networks.value(f"y_{dtype}", number, None) for dtype, number in DTYPES.items()],
    )
    path = saved(model, tmp_path / "identities.onnx")
    isolated, here = IsolatedModel(path), CpuModel(path)
    for shape in ((), (0, 3), (5,), (2, 3, 4)):
        feeds = {f"x_{dtype}": np.asarray(random.integers(0, 2, shape)).astype(dtype).T for dtype in DTYPES}
        outputs = [name for name in names if name.startswith("y")]
        got, wanted = isolated.run(outputs, feeds), here.run(outputs, feeds)
        for name in outputs:
            assert got[name].dtype == wanted[name].dtype
            assert np.array_equal(got[name], wanted[name])
            got[name][...] = 0  # the caller's own, as any result
    assert isolated.output_types == {f"y_{dtype}": np.dtype(dtype) for dtype in DTYPES}


def test_errors_are_those_of_onnxruntime_in_this_process(product, tmp_path):
    for model in (IsolatedModel(product), CpuModel(product)):
        with pytest.raises(InputError, match=r"ONNX Runtime [\d.]+ refuses the input: .*dimensions"):
            model.run(["y"], {"x": np.zeros((2, 17), np.float32)})
        with pytest.raises(ExecutionError, match="Required inputs"):
            model.run(["y"], {})
    (tmp_path / "nothing.onnx").write_bytes(b"nothing")
    for kind in (IsolatedModel, CpuModel):
        with pytest.raises(ExecutionError, match=r"ONNX Runtime [\d.]+ cannot run this model"):
            kind(tmp_path / "nothing.onnx")


def test_what_is_no_array_of_numbers_is_an_error_and_the_process_goes_on(product):
    model = IsolatedModel(product)
    with pytest.raises(ExecutionError, match="'x' is of object"):
        model.run(["y"], {"x": np.array([["text"]], object)})
    assert model.run(["y"], {"x": networks.rows(2)})["y"].shape == (2, 8)


def test_a_calibration_of_what_crashes_is_an_error(crashing, tmp_path):
    with pytest.raises(ExecutionError, match="crashed when it was to calibrate"):
        calibrated_magnitudes(crashing, [{"x": np.ones((2, 4), np.float32)}], "entropy", ["Mul"], tmp_path)


def test_models_end_with_their_block(product):
    with shared_process():
        model = IsolatedModel(product)
    with pytest.raises(ExecutionError, match="was ended"):
        model.run(["y"], {"x": networks.rows(2)})


@pytest.mark.slow
def test_the_process_ends_with_the_one_that_started_it(product):
    script = f"""
import os, signal
from mlflow_trt.backends.onnxruntime_process import IsolatedModel
from pathlib import Path
model = IsolatedModel(Path({str(product)!r}))
print(model._process._child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    assert ended.returncode == -signal.SIGKILL
    child = int(ended.stdout)
    wait_for(lambda: not is_running(child))
