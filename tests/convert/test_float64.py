"""float64, which TensorRT has not: engines compute it in float32, callers see float64, and the cost is measured."""

from __future__ import annotations

import json

import mlflow
import numpy as np
import onnx
import onnx.parser
import pytest
from compare import relative_error
from helpers import read, reference, typed_model, wait_for
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from networks import wide_product

import mlflow_trt
from mlflow_trt import AccuracyError, InputDtypeError, Tolerance, UnsupportedModelError
from mlflow_trt.convert.onnx.narrow import has_float64
from mlflow_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from mlflow_trt.store.folder import read_folder
from mlflow_trt.store.record import FLOAT64_FORMAT, FORMAT

ROWS = np.random.default_rng(7).standard_normal((16, 4))
MODELS = {
    "constants": "(double[batch, 4] x) => (double[batch, 4] y) <double[4] w = {1.1, 2.2, 3.3, 4.4}> "
    "{ half = Constant <value = double[1] {0.3}> () scaled = Mul (x, w) y = Add (scaled, half) }",
    "made of a shape": "(double[batch, 4] x) => (double[batch, 4] y) "
    "{ shape = Shape (x) filled = ConstantOfShape <value = double[1] {0.3}> (shape) y = Add (x, filled) }",
    "in branches": "(double[16, 4] x) => (double[16, 4] y) { least = Constant <value = double {-100.0}> () "
    "sum = ReduceSum <keepdims = 0> (x) c = Less (least, sum) y = If (c) <"
    "then_branch = then () => (double[16, 4] u) { k = Constant <value = double[1] {0.3}> () u = Add (x, k) }, "
    "else_branch = other () => (double[16, 4] v) { v = Neg (x) }> }",
    "beside integers": "(double[batch, 4] x) => (double[batch, 4] y, int64[batch] first) "
    "{ y = Exp (x) first = ArgMax <axis = 1, keepdims = 0> (x) }",
    "inside": "(float[batch, 4] x) => (float[batch, 4] y) <double[4] w = {1.1, 2.2, 3.3, 4.4}> "
    "{ wide = Cast <to = 11> (x) scaled = Mul (wide, w) y = Cast <to = 1> (scaled) }",
}
FUNCTION = """ y = own.shifted (x) } <domain: "own", opset_import: ["": 20]> shifted (a) => (b)
    { k = Constant <value = double[1] {0.3}> () b = Add (a, k) }"""


def model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20, "own": 1]> network {text}')


@pytest.mark.parametrize(
    "source",
    [*map(model, MODELS.values()), model("(double[batch, 4] x) => (double[batch, 4] y) {" + FUNCTION)],
    ids=[*MODELS, "in a function"],
)
def test_it_is_computed_in_float32(source, tmp_path):
    typed = typed_model(source, tmp_path, "fp32")
    computed = onnx.load(typed.path)
    onnx.checker.check_model(computed, full_check=True)
    assert not has_float64(computed)
    assert any("computes with float64, which TensorRT has not" in remark for remark in typed.report.remarks)
    read_again = read(source, tmp_path)
    assert (typed.inputs, typed.outputs) == (read_again.inputs, read_again.outputs)
    with (
        OnnxRuntimeSession(typed.path, typed.inputs, typed.outputs) as session,
        reference(read_again) as original,
    ):
        got, expected = session.run({"x": ROWS}), original.run({"x": ROWS})
    assert {name: array.dtype for name, array in got.items()} == {name: one.dtype for name, one in expected.items()}
    assert relative_error(got, expected) < 1e-6


def test_who_does_not_wait_gets_float64_too(tmp_path):
    typed = typed_model(wide_product(), tmp_path, "fp32")
    answers = []
    with OnnxRuntimeSession(typed.path, typed.inputs, typed.outputs) as session:
        expected = session.run({"x": ROWS})["y"]
        session.submit({"x": ROWS}, lambda outputs, error: answers.append((outputs, error)))
        wait_for(lambda: answers)
    ((outputs, error),) = answers
    assert error is None
    assert expected.dtype == outputs["y"].dtype == np.float64
    assert np.array_equal(outputs["y"], expected)


def test_what_float32_cannot_hold_is_refused(tmp_path):
    typed = typed_model(wide_product(), tmp_path, "fp32")
    with (
        OnnxRuntimeSession(typed.path, typed.inputs, typed.outputs) as session,
        pytest.raises(InputDtypeError, match=r"'x', row 1: the value at \[1, 2\] is too large for float32"),
    ):
        session.run({"x": np.where(np.arange(8).reshape(2, 4) == 6, 1e300, 1.0)})
    for large in ("large = Constant <value = double[1] {1e300}> ()", ""):
        stored = "" if large else "<double[1] large = {1e300}>"
        source = model(
            f"(float[batch, 4] x) => (float[batch, 4] y) {stored} {{ {large} wide = Cast <to = 11> (x) "
            "product = Mul (wide, large) quotient = Div (product, large) y = Cast <to = 1> (quotient) }"
        )
        with pytest.raises(UnsupportedModelError, match="constant large is of float64, .* too large for float32"):
            typed_model(source, tmp_path, "fp32")


@pytest.mark.parametrize(
    "nodes",
    [
        "m = Max (x, least) y = Log (m)",
        "s = Shape (x) filled = ConstantOfShape <value = double[1] {1e-40}> (s) y = Div (x, filled)",
        "m = Mul (x, small) y = Div (m, small)",
    ],
)
def test_a_setting_that_float32_has_not_is_refused(nodes, tmp_path):
    """It would be 0, or what a GPU makes of it: the logarithm of the least number is finite, and that of 0 is not."""
    source = model(
        f"(double[batch, 16] x) => (double[batch, 16] y) <double least = {{2.2250738585072014e-308}}> {{ {nodes} }}"
    )
    source.graph.initializer.append(onnx.numpy_helper.from_array(np.linspace(1e-50, 2e-50, 16), "small"))
    with pytest.raises(UnsupportedModelError, match="is of float64, .* has [12].*e-[0-9]+, which is too small for"):
        typed_model(source, tmp_path, "fp32")


def test_single_weights_may_vanish(tmp_path):
    source = wide_product()
    weights = onnx.numpy_helper.to_array(source.graph.initializer[0]).copy()
    weights.reshape(-1)[:3] = 1e-60
    assert weights.size > 8
    source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, source.graph.initializer[0].name))
    typed = typed_model(source, tmp_path, "fp32", tolerance=Tolerance(relative_error=1e-6))
    assert not typed.comparison.problems


@pytest.mark.parametrize(
    "nodes",
    [
        "n = Constant <value_int = 16> () w = HannWindow <output_datatype = 11> (n) y = Mul (x, w)",
        "y = LayerNormalization <stash_type = 11> (x, scale)",
    ],
)
def test_every_attribute_that_names_a_type_counts(nodes, tmp_path):
    kind = "double" if "Window" in nodes else "float"
    source = model(f"({kind}[batch, 16] x) => ({kind}[batch, 16] y) {{ {nodes} }}")
    source.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(16, np.float32), "scale"))
    assert has_float64(source)
    typed = typed_model(source, tmp_path, "fp16", tolerance=Tolerance(relative_error=1e-3))
    assert not has_float64(onnx.load(typed.path))
    assert not typed.comparison.problems


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_float32_makes_another_shape_of_is_refused(precision, tmp_path):
    """From 0 to 0.3 by 0.1 are three numbers in float64, and four in float32."""
    source = model(
        "(double[batch, 3] x) => (double[batch, 3] y) "
        "<double start = {0.0}, double limit = {0.3}, double step = {0.1}> "
        "{ numbers = Range (start, limit, step) y = Mul (x, numbers) }"
    )
    with pytest.raises(UnsupportedModelError, match="float64|nothing is known of the values"):
        typed_model(source, tmp_path, precision, tolerance=Tolerance(relative_error=1e-3))


def test_what_float32_costs_is_measured_without_a_gpu(tmp_path):
    mlflow_trt.save_model(wide_product(), tmp_path / "model")
    (comparison,) = read_folder(tmp_path / "model").record.comparisons
    assert comparison.subject.startswith("the fp32 model, on ONNX Runtime")
    assert 1e-9 < comparison.relative_error < 1e-6
    digits_lost = model(
        "(double[batch, 4] x) => (double[batch, 4] y) <double[1] far = {1000000000.0}> "
        "{ shifted = Add (x, far) y = Sub (shifted, far) }"
    )
    with pytest.raises(AccuracyError, match="the fp32 model, on ONNX Runtime, is too far from the source model"):
        mlflow_trt.save_model(digits_lost, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    mlflow_trt.save_model(digits_lost, tmp_path / "lost", verify=False)


def test_the_given_data_is_what_float32_is_measured_on(tmp_path):
    """Seconds since 1970: float32 rounds them to two minutes, which noise would not tell."""
    source = model(
        "(double[batch, 4] x) => (double[batch, 4] y) <double[1] start = {1700000000.0}> { y = Sub (x, start) }"
    )
    with pytest.raises(AccuracyError, match="on 16 rows of calibration data"):
        mlflow_trt.save_model(source, tmp_path / "model", calibration_data=ROWS * 60 + 1.7e9)


@pytest.mark.parametrize(("precision", "largest"), [("fp16", 1e-3), ("bf16", 1e-2), ("int8", 2e-2)])
def test_other_precisions(precision, largest, tmp_path):
    onnx.save_model(wide_product(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    mlflow_trt.save_model(tmp_path / "m.onnx", tmp_path / "model", precision=precision, calibration_data=ROWS)
    record = read_folder(tmp_path / "model").record
    assert 1e-5 < record.comparisons[0].relative_error < largest
    assert [spec.dtype for spec in (*record.inputs, *record.outputs)] == ["float64", "float64"]


def test_the_record_is_of_a_format_of_its_own(tmp_path):
    """Releases that know of no such models would call the record damaged."""
    for name, source in (("outside", wide_product()), ("inside", model(MODELS["inside"]))):
        mlflow_trt.save_model(source, tmp_path / name, verify=False)
        record = json.loads((tmp_path / name / "mlflow_trt.json").read_text())
        assert record["format"] == {"outside": FLOAT64_FORMAT, "inside": FORMAT}[name]


def test_the_signature_is_of_doubles(tmp_path):
    mlflow_trt.save_model(wide_product(), tmp_path / "derived", verify=False)
    assert "double" in str(Model.load(tmp_path / "derived").signature.outputs)
    mlflow_trt.save_model(wide_product(), tmp_path / "enforced", verify=False, signature=True)
    enforced = mlflow.pyfunc.load_model(str(tmp_path / "enforced"), model_config={"runtime": "onnxruntime"})
    with reference(read(wide_product(), tmp_path)) as session:
        expected = session.run({"x": ROWS})["y"]
    assert np.array_equal(enforced.predict({"x": ROWS})["y"], expected)
    with pytest.raises(MlflowException, match="float32 does not match expected dtype float64"):
        enforced.predict({"x": ROWS.astype(np.float32)})


def test_the_typed_model_is_verified_later(tmp_path):
    mlflow_trt.save_model(wide_product(), tmp_path / "model", verify=False)
    comparison = mlflow_trt.verify_model(str(tmp_path / "model"), data={"x": ROWS})
    assert 1e-9 < comparison.relative_error < 1e-6
