"""The load policy on a machine without a GPU; tests/gpu has the other half."""

from __future__ import annotations

import json
import shutil
import sys

import networks
import pytest
from compare import relative_error
from real_models import MAGIKA

import mlflow_trt
from mlflow_trt import IntegrityError, LoadSettings, MissingDependencyError, OptionError, RuntimeUnavailableError
from mlflow_trt.backends.cuda_driver import Hardware
from mlflow_trt.core.types import ComputeCapability, Gpu
from mlflow_trt.runtime.cuda import device

NO_DRIVER = Hardware(problem="no NVIDIA driver: libcuda.so.1 was not found")
A_GPU = Gpu(ordinal=0, name="RTX A", compute_capability=ComputeCapability(8, 6), memory=1, uuid="GPU-1")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same machine wherever the tests run."""
    monkeypatch.setattr(device, "probe", lambda: NO_DRIVER)
    monkeypatch.setattr(device, "_devices", {})


def test_without_a_gpu_tensorrt_is_an_error(magika_folder):
    with pytest.raises(RuntimeUnavailableError, match=r"no NVIDIA driver.*Use runtime='onnxruntime'"):
        mlflow_trt.load_model(str(magika_folder))


def test_auto_says_why_it_is_not_tensorrt(magika_folder, messages):
    with mlflow_trt.load_model(str(magika_folder), runtime="auto") as session:
        assert session.runtime == "onnxruntime"
        assert "no NVIDIA driver" in session.fallback_reason
        assert "Running on ONNX Runtime, on the CPU, since TensorRT cannot run here: " in messages.text


def test_onnxruntime_runs_the_source_model(cls_folder, magika_folder):
    with mlflow_trt.load_model(str(magika_folder), runtime="onnxruntime") as session:
        import onnxruntime as ort

        assert session.fallback_reason is None
        plain = ort.InferenceSession(str(MAGIKA.path()), providers=["CPUExecutionProvider"])
        feeds = MAGIKA.feeds(5)
        expected = dict(zip(["target_label"], plain.run(None, feeds), strict=True))
        assert relative_error(session.run(feeds), expected) == 0


def test_a_gpu_that_nothing_can_call_is_named(magika_folder, monkeypatch):
    monkeypatch.setattr(device, "probe", lambda: Hardware(driver="580", cuda="13.0", gpus=(A_GPU,)))
    for package in ("pycuda", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pycuda cannot be imported .*mlflow-trt\[cuda-core\]") as caught:
        mlflow_trt.load_model(str(magika_folder))
    assert caught.value.packages == ("pycuda", "cuda-bindings")


def test_a_device_that_is_not_there_is_named(magika_folder, monkeypatch):
    monkeypatch.setattr(device, "probe", lambda: Hardware(driver="580", cuda="13.0", gpus=(A_GPU,)))
    with pytest.raises(RuntimeUnavailableError, match=r"no CUDA device 3; this process sees 0: RTX A \(sm86\)"):
        mlflow_trt.load_model(str(magika_folder), device=3)


def test_auto_does_not_hide_a_mistake(magika_folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRT_DISTRIBUTION", "tensorrt-rtx")
    with pytest.raises(OptionError, match="MLFLOW_TRT_DISTRIBUTION is 'tensorrt-rtx'; expected one of"):
        mlflow_trt.load_model(str(magika_folder), runtime="auto")


def test_told_apart_axes_may_differ_at_run_time_too(tmp_path):
    """The session asks of its inputs what the typed model does, not what the source model's names seem to say."""
    model = networks.model(
        [networks.helper.make_node("Identity", ["a"], ["c"]), networks.helper.make_node("Identity", ["b"], ["d"])],
        [networks.value("a", networks.FLOAT, ["n", 4]), networks.value("b", networks.FLOAT, ["n", 4])],
        [networks.value("c", networks.FLOAT, ["n", 4]), networks.value("d", networks.FLOAT, [None, 4])],
    )
    shapes = {"a": ((1, 4), (2, 4), (4, 4)), "b": ((5, 4), (6, 4), (7, 4))}
    mlflow_trt.save_model(model, tmp_path / "model", shapes=shapes)
    with mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime") as session:
        outputs = session.run({"a": networks.rows(3, 4), "b": networks.rows(6, 4)})
        assert (len(outputs["c"]), len(outputs["d"])) == (3, 6)


def test_without_onnxruntime_both_packages_are_named(magika_folder, monkeypatch):
    monkeypatch.setattr("mlflow_trt.backends.onnxruntime.is_installed", lambda name: False)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime`, or `pip install onnxruntime-gpu`"):
        mlflow_trt.load_model(str(magika_folder), runtime="onnxruntime")


def test_a_changed_source_model_is_refused_even_by_auto(magika_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(magika_folder, folder)
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    for runtime in ("auto", "onnxruntime"):
        with pytest.raises(IntegrityError, match=r"model.onnx is not the file that was logged"):
            mlflow_trt.load_model(str(folder), runtime=runtime)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "gpu"}, "runtime is 'gpu'; choose one of tensorrt, auto, onnxruntime"),
        ({"on_mismatch": "ignore"}, "on_mismatch is 'ignore'; choose one of rebuild, error"),
        ({"kernel_specialization": "none"}, "choose one of eager, lazy"),
        ({"warm_up": True}, "choose one of auto, on, background, off"),
        ({"max_batch_delay_ms": -1}, "expected milliseconds, 0 or more"),
        ({"cuda_graphs": "yes"}, "choose one of auto, on, off"),
        ({"device": -1}, "device is -1; expected a CUDA device ordinal"),
        ({"device": "cuda:0"}, "device is 'cuda:0'"),
        ({"device": []}, "a list of them, 'all' or 'own'"),
        ({"device": [0, True]}, "a list of them, 'all' or 'own'"),
        ({"device": [1, 0, 1]}, "names a GPU twice"),
        ({"allow_engine_host_code": "no"}, "allow_engine_host_code is 'no'; expected true or false"),
        ({"devise": 0}, "unknown load setting 'devise'; there are runtime, on_mismatch"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(OptionError, match=message) as caught:
        LoadSettings.of(settings)
    assert caught.value.option in settings


@pytest.mark.parametrize("device", [1, [0, 2], "all", "own"])
def test_settings_survive_json(device):
    settings = LoadSettings(runtime="auto", device=device)
    assert LoadSettings.of(json.loads(json.dumps(settings.to_dict()))) == settings
