"""Verification at log time, its gate, and the self-test at load. Without a GPU the typed model is what is compared."""

from __future__ import annotations

import json
import shutil

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from helpers import reference
from onnx import helper
from real_models import MAGIKA

import mlflow_trt
from mlflow_trt import (
    AccuracyError,
    IntegrityError,
    MissingDependencyError,
    OnnxModelError,
    OptionError,
    OutOfMemoryError,
    SelfTestError,
    Tolerance,
)
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.core.accuracy import Verdict
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.flavor.metrics import log_metrics
from mlflow_trt.flavor.undo import Undo
from mlflow_trt.store import cache, self_test
from mlflow_trt.store.folder import read_folder

DATA = {"x": networks.rows(32)}


def test_what_was_rewritten_is_compared(tmp_path):
    """It is no longer the source model, of which there would be nothing to compare without a GPU."""
    model = networks.model(
        [helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)],
        [networks.value("x", networks.FLOAT, ["batch", 4, 6])],
        [networks.value("y", networks.FLOAT, ["batch", 4, 6])],
        [networks.constant("scale", np.float32([1.5, 0.5])), networks.constant("bias", np.float32([0.1, 0.3]))],
    )
    model.opset_import[0].version = 18
    mlflow_trt.save_model(model, tmp_path / "m")
    record = read_folder(tmp_path / "m").record
    (comparison,) = record.comparisons
    assert comparison.subject == "the fp32 model, on ONNX Runtime,"
    assert comparison.verdict is Verdict.PASSED
    assert comparison.relative_error < 1e-5
    assert not any("the accuracy was not measured" in remark for remark in record.remarks)


def test_numbers_are_in_the_record_the_params_and_the_metrics(store):
    info = mlflow_trt.log_model(networks.product(), name="m", precision="fp16", calibration_data=DATA)
    record = read_record(info.model_uri)
    (comparison,) = record.comparisons
    assert comparison.verdict is Verdict.PASSED
    assert 0 < comparison.relative_error < 1e-3
    logged = store.client.get_logged_model(info.model_id)
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.run_name == "verification of m, fp16"
    used = store.client.get_run(run.info.run_id).inputs.model_inputs
    assert [model.model_id for model in used] == [info.model_id]
    assert logged.params["mlflow_trt.verification"] == "passed"
    assert float(logged.params["mlflow_trt.relative_error"]) == pytest.approx(comparison.relative_error, rel=0.01)
    metrics = {metric.key: metric.value for metric in logged.metrics}
    assert metrics["mlflow_trt/y/relative_error"] == comparison.relative_error
    assert set(metrics) == {
        f"mlflow_trt/y/{name}"
        for name in (
            "relative_error", "max_abs_error", "mean_abs_error", "cosine_similarity", "top_class_agreement",
            "median_row_error", "worst_row_error"
        )
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("node", "found"),
    [
        (helper.make_node("ReduceMean", ["h"], ["y"], keepdims=0), r"shape \(\) for 4 rows"),
        (helper.make_node("ReduceMean", ["h"], ["y"], axes=[0], keepdims=0), r"shape \(8,\) for 4 rows"),
    ],
    ids=["a scalar", "another axis"],
)
def test_an_output_that_has_no_rows_though_it_is_declared_to_have_them(node, found, precision, tmp_path):
    model = networks.product()
    model.graph.node[0].output[0] = "h"
    model.graph.node.append(node)
    model.graph.output[0].CopyFrom(networks.value("y", networks.FLOAT, ["batch"]))
    options = {"precision": precision, "batch": (1, 4, 8), "calibration_data": networks.rows(8)}
    with pytest.raises(OnnxModelError, match=rf"declares the output y: float32\[batch\], and ONNX Runtime .* {found}"):
        mlflow_trt.save_model(model, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_samples_that_no_memory_holds(tmp_path):
    with pytest.raises(OutOfMemoryError, match=r"input 'x' takes 137.4 GB .* give a smaller usual size"):
        mlflow_trt.save_model(networks.product(), tmp_path / "model", batch=(1, 2**31 - 1, 2**31 - 1))


def test_metrics_go_to_the_active_run_where_there_is_one(store):
    with mlflow.start_run() as run:
        mlflow_trt.log_model(networks.product(), name="m", precision="fp16", calibration_data=DATA)
    assert "mlflow_trt/y/relative_error" in store.client.get_run(run.info.run_id).data.metrics
    assert len(store.client.search_runs([store.experiment_id])) == 1


@pytest.mark.parametrize("name", ["scores[0]", "/head/Gemm_output_0", "scores:0"])
def test_outputs_of_any_name_have_metrics(name, store):
    model = networks.product()
    model.graph.output[0].name = model.graph.node[0].output[0] = name
    info = mlflow_trt.log_model(model, name="m", precision="fp16", calibration_data=DATA)
    metrics = {metric.key for metric in store.client.get_logged_model(info.model_id).metrics}
    assert f"mlflow_trt/{name.translate(str.maketrans('/[]:', '____'))}/relative_error" in metrics
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.status == "FINISHED"


def test_metrics_that_mlflow_refuses_are_a_warning(store, messages):
    info = mlflow_trt.log_model(networks.product(), name="m", verify=False)
    log_metrics(Undo(), {"not[allowed]": 1.0}, info.model_id)
    assert "metrics of the model could not be logged" in messages.text
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.status == "FAILED"


def test_a_comparison_that_proves_nothing_is_refused_where_one_was_demanded(store):
    with pytest.raises(AccuracyError, match=r"cannot be judged") as caught:
        mlflow_trt.log_model(
            networks.product(), name="m", precision="fp16", calibration_data={"x": np.zeros((8, 16), np.float32)},
            verify=Tolerance(relative_error=0.1), registered_model_name="product",
        )  # fmt: skip
    assert caught.value.comparison.verdict is Verdict.INCONCLUSIVE
    assert store.is_untouched()


def test_a_gate_that_is_too_tight_leaves_nothing_and_shows_the_numbers(store):
    with pytest.raises(AccuracyError, match=r"relative error 0\.\d+, at most 1e-05 is tolerated") as caught:
        mlflow_trt.log_model(
            networks.product(), name="m", precision="int8", calibration_data=DATA,
            verify=Tolerance(relative_error=1e-5), registered_model_name="product",
        )  # fmt: skip
    assert caught.value.comparison.relative_error > 1e-3
    assert store.is_untouched()


def test_noise_that_a_model_fails_on_is_said_to_be_noise(tmp_path):
    with pytest.raises(AccuracyError, match="Pass calibration_data= with real inputs"):
        mlflow_trt.save_model(
            networks.product(), tmp_path / "m", precision="fp16", verify=Tolerance(relative_error=1e-7)
        )
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_loud_row_does_not_make_the_others_pass(tmp_path, messages):
    """Beside it they are rounded to nothing in int8, and the error over all rows together is that of the loud one."""
    data = networks.rows(64)
    data[0] *= 1000
    with pytest.raises(AccuracyError, match="relative error of the median of 64 rows"):
        mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="int8", calibration_data=data)
    assert not (tmp_path / "m").exists()
    given = Tolerance(relative_error=0.1)
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="int8", calibration_data=data, verify=given)
    assert "does not judge rows, and these are off: output 'y': relative error of the median" in messages.text
    (comparison,) = read_folder(tmp_path / "m").record.comparisons
    assert comparison.relative_error < 0.1 < comparison.outputs[0].median_row_error <= 1
    code, output, errors = run("verify", tmp_path / "m", "--relative-error", 0.1)
    assert code == 0, errors
    assert "median row" in output


def test_nodes_go_back_to_float32_until_the_gate_is_passed(tmp_path):
    model = networks.transformer()
    data = networks.sentences(16, 24)
    mlflow_trt.save_model(
        model, tmp_path / "m", precision="int8", calibration_data=data, verify=Tolerance(relative_error=0.02),
        batch=(2, 4, 8), shapes={"input_ids": ((-1, 4), (-1, 24), (-1, 48))},
    )  # fmt: skip
    record = read_folder(tmp_path / "m").record
    assert record.comparisons[0].relative_error <= 0.02
    assert 0 < record.precision_report.changed_nodes < 13
    assert any("the accuracy needs it" in node.reason for node in record.precision_report.kept)
    report = (tmp_path / "m" / "precision_report.md").read_text()
    assert "the accuracy needs it" in report
    assert "relative error" in report


def test_noise_is_no_evidence_and_that_is_said(tmp_path, messages):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="fp16")
    assert "generated noise, which is no evidence" in messages.text
    assert "no evidence" in " ".join(read_folder(tmp_path / "m").record.remarks)


def test_verify_may_be_left_out(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="fp16", calibration_data=DATA, verify=False)
    record = read_folder(tmp_path / "m").record
    assert (record.comparisons, record.golden) == ((), None)
    assert not (tmp_path / "m" / "golden.npz").exists()
    with pytest.raises(OptionError, match="verify is 'yes'; expected True, False or a Tolerance"):
        mlflow_trt.save_model(networks.product(), tmp_path / "n", verify="yes")


def test_without_onnxruntime_fp32_is_converted_unverified_and_fp16_is_not(tmp_path, monkeypatch, messages):
    monkeypatch.setattr("mlflow_trt.backends.onnxruntime.is_installed", lambda name: False)
    mlflow_trt.save_model(networks.product(), tmp_path / "m")
    assert "not verified: ONNX Runtime is not installed" in " ".join(read_folder(tmp_path / "m").record.remarks)
    assert "is not verified" in messages.text
    with pytest.raises(MissingDependencyError, match="onnxruntime-gpu"):
        mlflow_trt.save_model(networks.product(), tmp_path / "n", precision="fp16")
    assert not (tmp_path / "n").exists()


def test_the_golden_sample_is_what_the_source_model_computes(magika_folder):
    folder = read_folder(magika_folder)
    golden = folder.read_golden(folder.record.golden)
    with reference(read_onnx(MAGIKA.path(), magika_folder)) as session:
        expected = session.run(golden.feeds)
    assert golden.feeds["bytes"].shape == (8, 2048)
    assert all(np.array_equal(golden.outputs[name], expected[name]) for name in expected)


@pytest.fixture
def product_folder(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", calibration_data=DATA)
    return tmp_path / "m"


def test_the_self_test_passes_once_and_is_remembered(product_folder, monkeypatch):
    folder = read_folder(product_folder)
    runs = []
    with mlflow_trt.load_model(str(product_folder), runtime="onnxruntime") as session:
        run = session.run
        monkeypatch.setattr(session, "run", lambda feeds: (runs.append(1), run(feeds))[1])
        self_test.check(session, folder, {"engine": "a"})
        self_test.check(session, folder, {"engine": "a"})
        assert len(runs) == 1
        self_test.check(session, folder, {"engine": "b"})
        assert len(runs) == 2
    shutil.rmtree(cache.directory())


def test_an_engine_that_answers_wrongly_is_refused_with_the_numbers(product_folder, tmp_path):
    other = networks.product()
    weights = np.frombuffer(other.graph.initializer[0].raw_data, np.float32) * np.float32(1.1)
    other.graph.initializer[0].raw_data = weights.tobytes()
    mlflow_trt.save_model(other, tmp_path / "other")
    with (
        mlflow_trt.load_model(str(tmp_path / "other"), runtime="onnxruntime") as session,
        pytest.raises(SelfTestError, match="answers wrongly.*relative error 0.1, at most 0.02") as caught,
    ):
        self_test.check(session, read_folder(product_folder), {"engine": "a"})
    assert caught.value.comparison.relative_error == pytest.approx(0.1, rel=1e-3)


def loud() -> dict[str, np.ndarray]:
    """Rows of which one is a thousand times as loud as the others."""
    rows = networks.rows(8)
    rows[0] *= 1000
    return {"x": rows}


def test_the_self_test_looks_at_each_row(tmp_path):
    """An engine that is right in the loud row, and adds something to all others that they are lost in."""
    mlflow_trt.save_model(networks.product(), tmp_path / "m", calibration_data=loud())
    other = networks.product()
    other.graph.node[0].output[0] = "h"
    other.graph.node.append(helper.make_node("Add", ["h", "noise"], ["y"]))
    other.graph.initializer.append(networks.constant("noise", np.float32(8)))
    mlflow_trt.save_model(other, tmp_path / "other")
    with (
        mlflow_trt.load_model(str(tmp_path / "other"), runtime="onnxruntime") as session,
        pytest.raises(SelfTestError, match="relative error of the median of .*rows") as caught,
    ):
        self_test.check(session, read_folder(tmp_path / "m"), {"engine": "a"})
    output = caught.value.comparison.outputs[0]
    assert output.relative_error < 0.02
    assert output.median_row_error > 0.5


def test_a_golden_sample_that_was_changed_is_refused(product_folder):
    golden = product_folder / "golden.npz"
    golden.write_bytes(golden.read_bytes() + b"\0")
    folder = read_folder(product_folder)
    with (
        mlflow_trt.load_model(str(product_folder), runtime="onnxruntime") as session,
        pytest.raises(IntegrityError, match=r"golden.npz is not the file that was logged"),
    ):
        self_test.check(session, folder, {})


def test_records_of_the_first_version_still_load(product_folder):
    file = product_folder / "mlflow_trt.json"
    record = json.loads(file.read_text())
    for name in ("comparisons", "golden"):
        del record[name]
    for name in ("node_types", "weight_types", "kept", "largest", "calibration", "size_before", "size_after"):
        del record["precision_report"][name]
    for name in ("keep_float32", "calibration_method"):
        del record["recipe"][name]
    file.write_text(json.dumps(record))
    folder = read_folder(product_folder)
    with mlflow_trt.load_model(str(product_folder), runtime="onnxruntime") as session:
        self_test.check(session, folder, {})  # there is nothing to test


@pytest.fixture
def fp16_folder(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="fp16", calibration_data=DATA)
    return tmp_path / "m"


@pytest.mark.parametrize("data", [None, "inputs.npz"])
def test_the_command_verifies_what_was_logged(fp16_folder, tmp_path, data):
    np.savez(tmp_path / "inputs.npz", x=networks.rows(50, seed=5))
    arguments = ["--data", tmp_path / data] if data else []
    code, output, errors = run("verify", fp16_folder, *arguments, "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert found["verdict"] == "passed"
    assert found["inputs"] == ("50 rows of the given data" if data else "8 rows of the golden sample")
    assert found["subject"].startswith("the fp16 typed model, emulated on ONNX Runtime")
    assert 0 < found["outputs"][0]["relative_error"] < 1e-3


def test_the_command_compares_no_model_with_itself(product_folder):
    """The typed model of fp32 is the source model, so without a GPU there is nothing to compare."""
    code, output, errors = run("verify", product_folder)
    assert code == 3, errors
    assert output.startswith("nothing was compared: the fp32 typed model is the source model itself, and the engine")
    code, output, _ = run("verify", product_folder, "--json")
    assert code == 3
    assert json.loads(output)["verdict"] == "nothing was compared"


def test_the_command_names_the_data_that_does_not_fit(fp16_folder, tmp_path):
    np.savez(tmp_path / "inputs.npz", y=networks.rows(50))
    code, _, errors = run("verify", fp16_folder, "--data", tmp_path / "inputs.npz")
    assert code == 1
    assert errors.startswith("Error: the given data: input 'x' is missing")


def test_the_command_fails_where_the_model_does(fp16_folder):
    code, output, _ = run("verify", fp16_folder, "--relative-error", "1e-6")
    assert code == 1
    assert "at most 1e-06 is tolerated" in output


def test_inspect_shows_what_was_measured_and_what_stayed(tmp_path):
    mlflow_trt.save_model(networks.transformer(), tmp_path / "m", calibration_data=networks.sentences(8, 24),
                          recipe=mlflow_trt.Recipe(precision="fp16", keep_float32="Softmax", batch=(2, 4, 8),
                                                   shapes={"input_ids": ((-1, 4), (-1, 24), (-1, 48))}))  # fmt: skip
    code, output, errors = run("inspect", tmp_path / "m")
    assert code == 0, errors
    assert "keep_float32" in output
    assert "against the source model on ONNX Runtime" in " ".join(output.split())
    assert "passed" in output
