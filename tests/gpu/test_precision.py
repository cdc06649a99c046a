"""Precisions on the GPU: what the emulation promised, engines keep; and an engine that answers wrongly is caught."""

from __future__ import annotations

import mlflow
import networks
import numpy as np
import pytest
from compare import relative_error
from real_models import CLS, MAGIKA, ON_THE_GPU, REC, calibration_data

import mlflow_trt
from mlflow_trt import ExecutionError, Precision, SelfTestError, Tolerance
from mlflow_trt.backends import tensorrt as trt
from mlflow_trt.store import cache
from mlflow_trt.store.folder import read_folder

pytestmark = pytest.mark.gpu

# On Hopper, which is no official target of TensorRT-RTX, cuDNN has no kernel for some of its convolutions.
WITHOUT_KERNELS = {("rec", "fp16"), ("rec", "bf16")}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("model", ON_THE_GPU, ids=lambda model: model.name)
def test_engines_stay_within_the_tolerance(model, precision, tmp_path, report):
    folder = tmp_path / "model"
    try:
        mlflow_trt.save_model(
            model.path(), folder, **model.recipe, precision=precision, calibration_data=calibration_data(model)
        )
    except ExecutionError as error:
        if (model.name, precision) not in WITHOUT_KERNELS:
            raise
        report((model.name, precision, "", "", error.message[:90], "", ""))
        pytest.skip(f"this GPU has no kernels for it: {error.message[:200]}")
    record = read_folder(folder).record
    engine = record.comparisons[-1]
    assert "TensorRT" in engine.subject
    assert 0 < engine.relative_error < Tolerance.default(Precision(precision)).relative_error
    emulated = f"emulated {record.comparisons[0].relative_error:.2e}" if len(record.comparisons) > 1 else ""
    kept = len(record.precision_report.kept)
    report((model.name, precision, f"{record.precision_report.changed_nodes} nodes, {kept} kept",
            f"{max(output.max_abs_error for output in engine.outputs):.2e}", f"{engine.relative_error:.2e} {emulated}",
            f"{record.engines[0].build_seconds:.2f}", ""))  # fmt: skip
    with mlflow_trt.load_model(str(folder)):
        pass  # the self-test passes
    if precision == "fp32":
        assert "that of TF32, not of strict float32" in " ".join(record.remarks)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_means_are_right(count, precision, tmp_path):
    data = {"x": networks.rows(64)}
    mlflow_trt.save_model(networks.mean(count), tmp_path / "m", precision=precision, calibration_data=data)
    with (
        mlflow_trt.load_model(str(tmp_path / "m")) as engine,
        mlflow_trt.load_model(str(tmp_path / "m"), runtime="onnxruntime") as source,
    ):
        assert relative_error(engine.run(data), source.run(data)) < (0.01 if precision == "bf16" else 1e-3)


def test_weights_alone_in_int8(tmp_path, report):
    """On TensorRT-RTX before 1.7 of convolutions, on every TensorRT of what cannot be calibrated."""
    mlflow_trt.save_model(networks.rarely_alive(), tmp_path / "m", precision="int8", batch=(1, 16, 64),
                          calibration_data={"x": networks.rows(64)})  # fmt: skip
    assert [node.name for node in read_folder(tmp_path / "m").record.precision_report.weight_only] == ["dead_product"]
    alive = {"x": networks.rows(64) * 20}  # the first product is cut off at what was seen, the second is not
    with (
        mlflow_trt.load_model(str(tmp_path / "m")) as engine,
        mlflow_trt.load_model(str(tmp_path / "m"), runtime="onnxruntime") as source,
    ):
        assert relative_error(engine.run({"x": networks.rows(64)}), source.run({"x": networks.rows(64)})) < 0.03
        assert np.isfinite(engine.run(alive)["y"]).all()

    mlflow_trt.save_model(
        CLS.path(), tmp_path / "cls", **CLS.recipe, precision="int8", calibration_data=calibration_data(CLS)
    )
    record = read_folder(tmp_path / "cls").record
    partly = [node for node in record.precision_report.weight_only if node.operator == "Conv"]
    assert bool(partly) == (trt.load().is_rtx and trt.load().version_info < (1, 7))
    error = record.comparisons[-1].relative_error
    assert 0 < error < Tolerance.default(Precision.INT8).relative_error
    report(("cls", "int8", f"{len(partly)} convolutions with int8 weights", "", f"{error:.2e}", "", ""))


def test_magika_keeps_its_labels_in_fp16(tmp_path):
    feeds = MAGIKA.feeds(35)
    mlflow_trt.save_model(MAGIKA.path(), tmp_path / "m", **MAGIKA.recipe, precision="fp16", calibration_data=feeds)
    actual = mlflow.pyfunc.load_model(str(tmp_path / "m")).predict(feeds)
    with mlflow_trt.load_model(str(tmp_path / "m"), runtime="onnxruntime") as session:
        expected = session.run(feeds)
    for name, scores in expected.items():
        files = scores[::2]
        assert (files.max(axis=1) > 0.5).all()
        assert np.array_equal(actual[name][::2].argmax(axis=1), files.argmax(axis=1))


def test_an_engine_that_answers_wrongly_is_caught_at_load(tmp_path, messages):
    """The first call of rec with LAZY kernels is wrong on Hopper, without any error."""
    folder = tmp_path / "model"
    data = REC.feeds(4)
    mlflow_trt.save_model(REC.path(), folder, **REC.recipe, calibration_data=data)
    with pytest.raises(SelfTestError, match=r"answers wrongly: output .* relative error") as caught:
        mlflow_trt.load_model(str(folder), kernel_specialization="lazy")
    assert caught.value.comparison.relative_error > 0.02
    with mlflow_trt.load_model(str(folder), kernel_specialization="lazy", runtime="auto") as session:
        assert session.runtime == "onnxruntime"
        assert "answers wrongly" in session.fallback_reason
    with mlflow_trt.load_model(str(folder), kernel_specialization="lazy", self_test=False) as session:
        session.run(data)
    assert not list((cache.directory() / "self_tests").glob("*"))
    with mlflow_trt.load_model(str(folder), kernel_specialization="eager"):
        assert len(list((cache.directory() / "self_tests").glob("*"))) == 1
    assert "Self-test passed" in messages.text
