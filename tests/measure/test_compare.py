"""Two models side by side, where there is no GPU."""

from __future__ import annotations

import json

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from onnx import helper
from tiers import exhaustive

import mlflow_trt
from mlflow_trt import InputShapeError
from mlflow_trt.measure.side_by_side import compare_models

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def models(module_store):
    """A model, and what is made of it in fp32 and in fp16, in a store."""
    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    mlflow_trt.convert_model_version("models:/p/1", "p-trt", batch=(1, 4, 8))
    mlflow_trt.convert_model_version("models:/p/1", "p-half", precision="fp16", batch=(1, 4, 8))
    return module_store


def other():
    model = networks.product()
    weights = networks.onnx.numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(networks.constant("w", (1.5 * weights).astype(np.float32)))
    return model


def test_without_a_gpu_the_typed_model_is_compared_and_its_speed_is_not_measured(models):
    data = {"x": networks.rows(5)}
    result = compare_models("models:/p/1", "models:/p-half/1", batches=(1, 4), data=data, seconds=0.02)
    assert str(result.comparison.verdict) == "passed"
    assert result.comparison.inputs == "5 rows of the given data"
    assert 1e-5 < result.comparison.relative_error < 1e-2
    assert "the fp16 typed model, emulated on ONNX Runtime" in result.compared[1]
    assert {(row.model, row.batch) for row in result.benchmark.measurements} == {("models:/p/1", 1), ("models:/p/1", 4)}
    (problem,) = result.benchmark.problems
    assert "models:/p-half/1 does not run on TensorRT here" in problem
    assert "In its place, the fp16 typed model, emulated on ONNX Runtime" in problem


def test_each_row_is_judged_whichever_of_the_models_comes_first(models):
    """An ONNX file does not say that its rows are independent; the record of the other model does."""
    data = {"x": networks.rows(5)}
    for uris in (("models:/p/1", "models:/p-half/1"), ("models:/p-half/1", "models:/p/1")):
        (output,) = compare_models(*uris, batches=(1,), data=data, seconds=0.02).comparison.outputs
        assert output.rows == 5
        assert output.median_row_error is not None
        assert output.worst_row_error is not None
        assert 1e-5 < output.median_row_error < output.worst_row_error < 1e-2


def test_what_overflows_in_float16_fails_without_a_gpu(tmp_path):
    """Plain ONNX Runtime would run both nodes in float32, and see nothing."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Mul", ["p", "c"], ["y"], name="back"),
    ]
    x, y = (networks.value(name, networks.FLOAT, ["batch", width]) for name, width in (("x", 16), ("y", 8)))
    weights = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    constants = [networks.constant("w", 100 * weights), networks.constant("c", np.float32(0.01))]
    model = networks.model(nodes, [x], [y], constants)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    mlflow_trt.save_model(model, tmp_path / "m", precision="fp16", batch=(1, 4, 8), calibration_data=networks.rows(32))
    loud = {"x": 1000 * networks.rows(8)}
    result = compare_models(str(tmp_path / "m.onnx"), str(tmp_path / "m"), batches=(1,), data=loud, seconds=0.02)
    assert str(result.comparison.verdict) == "failed"
    assert result.comparison.outputs[0].infinities


def test_the_same_file_on_the_same_runtime_is_nothing_compared(models):
    """In fp32 the typed model is the source model, which would agree with itself whatever the engine computes."""
    for reference, subject in (("models:/p/1", "models:/p-trt/1"), ("models:/p/1", "models:/p/1")):
        result = compare_models(reference, subject, batches=(1,), seconds=0.02)
        assert str(result.comparison.verdict) == "nothing was compared"
        assert "both are the same file" in result.comparison.reason
        assert result.comparison.outputs == ()


def test_models_that_differ_fail(models, tmp_path):
    (tmp_path / "other.onnx").write_bytes(other().SerializeToString())
    result = compare_models("models:/p/1", str(tmp_path / "other.onnx"), batches=(1,), seconds=0.02)
    assert str(result.comparison.verdict) == "failed"
    assert result.comparison.outputs[0].relative_error == pytest.approx(0.5, rel=1e-3)
    assert result.comparison.inputs == "8 rows of generated noise"


@pytest.mark.exhaustive
def test_folders_of_either_kind(models, tmp_path):
    mlflow.onnx.save_model(networks.product(), tmp_path / "onnx", pip_requirements=["onnx"])
    mlflow_trt.save_model(networks.product(), tmp_path / "ours", batch=(1, 4, 8))
    (tmp_path / "other.onnx").write_bytes(other().SerializeToString())
    for folder in ("onnx", "ours"):
        result = compare_models(str(tmp_path / folder), str(tmp_path / "other.onnx"), batches=(1,), seconds=0.02)
        assert result.comparison.relative_error == pytest.approx(0.5, rel=1e-3)


def test_models_with_other_outputs_cannot_be_compared(models, tmp_path):
    network = networks.product()
    network.graph.output[0].name = network.graph.node[0].output[0] = "z"
    (tmp_path / "other.onnx").write_bytes(network.SerializeToString())
    with pytest.raises(InputShapeError, match="cannot be compared: the outputs are z; expected y"):
        compare_models("models:/p/1", str(tmp_path / "other.onnx"), seconds=0.02)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"nothing": networks.rows(6)}, "the given data: input 'x' is missing"),
        ({"x": networks.rows(6), "z": networks.rows(6)}, "the given data: there is no input 'z'"),
        ({"x": networks.rows(6, 15)}, r"the given data: input 'x' has the shape (6, 15); expected 16 at axis 1"),
        ({"x": networks.rows(0)}, "the given data: input 'x' has no rows"),
    ],
    ids=["no input", "one too many", "another layout", "no rows"],
)
@pytest.mark.parametrize("command", ["compare", *exhaustive("benchmark")])
def test_data_that_does_not_fit_is_an_error(command, arrays, words, models, tmp_path):
    np.savez(tmp_path / "junk.npz", **arrays)
    uris = ["models:/p/1", "models:/p-trt/1"] if command == "compare" else ["models:/p-trt/1"]
    arguments = ["--data", tmp_path / "junk.npz", "--seconds", "0.02"]
    code, _, errors = run(command, *uris, *arguments, MLFLOW_TRACKING_URI=models.uri, **NO_GPU)
    assert code == 1
    assert words in errors


def test_an_array_without_a_name_is_that_of_the_only_input(models, tmp_path):
    (tmp_path / "other.onnx").write_bytes(other().SerializeToString())
    np.savez(tmp_path / "unnamed.npz", networks.rows(6))
    np.save(tmp_path / "unnamed.npy", networks.rows(6))
    for file in ("unnamed.npz", "unnamed.npy"):
        data = tmp_path / file
        result = compare_models("models:/p/1", str(tmp_path / "other.onnx"), data=data, batches=(1,), seconds=0.02)
        assert result.comparison.inputs == "6 rows of the given data"
        assert result.comparison.relative_error == pytest.approx(0.5, rel=1e-3)


def test_the_command(models, tmp_path):
    tracking = {"MLFLOW_TRACKING_URI": models.uri, "MLFLOW_EXPERIMENT_ID": models.experiment_id}
    np.savez(tmp_path / "inputs.npz", x=networks.rows(6))
    arguments = ["--data", tmp_path / "inputs.npz", "--seconds", "0.02", "--batch", "2"]
    code, output, errors = run(
        "compare", "models:/p/1", "models:/p-half/1", *arguments, "--json", "--log", **tracking, **NO_GPU
    )
    assert code == 0, errors
    result = json.loads(output)
    assert result["comparison"]["verdict"] == "passed"
    assert "emulated" in result["comparison"]["compared"][1]
    metrics = mlflow.get_run(result["run_id"]).data.metrics
    assert 0 < metrics["accuracy/y/relative_error"] < 1e-2
    assert metrics["onnx_runtime_cpu/predict/p50_ms"] > 0
    (tmp_path / "other.onnx").write_bytes(other().SerializeToString())
    code, output, _ = run("compare", "models:/p/1", tmp_path / "other.onnx", *arguments, **tracking, **NO_GPU)
    assert code == 1
    assert output.startswith("failed: output 'y': relative error 0.5")
    code, output, _ = run("compare", "models:/p/1", "models:/p-trt/1", *arguments, **tracking, **NO_GPU)
    assert code == 3
    assert output.startswith("nothing was compared: both are the same file")
    np.savez(tmp_path / "zeros.npz", x=np.zeros((6, 16), np.float32))
    arguments[1] = tmp_path / "zeros.npz"
    code, output, _ = run("compare", "models:/p/1", tmp_path / "other.onnx", *arguments, **tracking, **NO_GPU)
    assert code == 1
    assert output.startswith("inconclusive: the reference hardly varies")
