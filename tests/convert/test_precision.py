"""Precision passes: what they change, what they keep in float32 and why, and that real models stay accurate."""

from __future__ import annotations

import re

import networks
import numpy as np
import onnx
import pytest
from compare import relative_error
from helpers import convert_in, read, typed_model
from onnx import TensorProto, helper
from real_models import CLS, DET_DYNAMIC, MAGIKA, REC, SILERO, TRANSFORMER, calibration_data
from tiers import exhaustive

import mlflow_trt
from mlflow_trt import Precision, Recipe, RecipeError, Tolerance, UnsupportedModelError
from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.convert.conversion import Conversion
from mlflow_trt.convert.engine.builder import build_engine
from mlflow_trt.convert.onnx import weights
from mlflow_trt.convert.onnx.graph import flatten
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.convert.onnx.rewrite import RewrittenModel
from mlflow_trt.convert.onnx.weights import write_model
from mlflow_trt.convert.precision.half import HalfPass
from mlflow_trt.convert.precision.ranges import Evidence
from mlflow_trt.convert.precision.sensitivity import FLOAT16
from mlflow_trt.convert.resolve_profiles import resolve_profiles
from mlflow_trt.convert.samples import SampleData, SampleOrigin, cut_samples, generate_samples
from mlflow_trt.convert.typed_model.maker import maker_for
from mlflow_trt.core.accuracy import Verdict
from mlflow_trt.core.comparing import compare
from mlflow_trt.core.types import Interface

REAL = SampleOrigin.CALIBRATION_DATA


def in_int8(model, folder, data) -> Conversion:
    """A small network in int8, within the usual tolerance."""
    return convert_in(
        folder,
        read(model, folder),
        Recipe(precision="int8"),
        data=SampleData(arrays=data, origin=REAL),
        tolerance=Tolerance.default(Precision.INT8),
    )


def converted(model, folder, precision, data, **recipe) -> Conversion:
    targets = ["sm89"] if precision == "fp8" else ()
    return convert_in(
        folder,
        read(model, folder),
        Recipe(**model.recipe, precision=precision, targets=targets, **recipe),
        data=SampleData(arrays=data, origin=REAL),
        tolerance=Tolerance.default(Precision(precision)),
    )


def reasons(typed) -> dict[str, str]:
    return {node.name: node.reason for node in typed.report.kept}


def elementwise(operator, *, constant=None, opset=17, **attributes):
    inputs = ["x"] if constant is None else ["x", "c"]
    model = networks.model(
        [helper.make_node(operator, inputs, ["y"], name="node", **attributes)],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
        [] if constant is None else [networks.constant("c", np.float32(constant))],
    )
    model.opset_import[0].version = opset
    return model


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_inputs_and_outputs_keep_their_names_and_types(precision, tmp_path):
    typed = typed_model(networks.product(), tmp_path, precision)
    assert [str(spec) for spec in (*typed.inputs, *typed.outputs)] == [
        "x: float32[batch, 16]",
        "y: float32[batch, 8]",
    ]
    weights = {tensor.name: tensor.data_type for tensor in onnx.load(typed.path).graph.initializer}
    assert set(weights.values()) == {TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16}
    assert typed.report.size_after < 0.6 * typed.report.size_before
    assert 0 < typed.comparison.relative_error < (1e-3 if precision == "fp16" else 1e-2)


def product_from_the_left(operator: str, **attributes) -> onnx.ModelProto:
    """y = (w @ x.T).T, whose weight is the first operand; its output channels have magnitudes of their own."""
    weights = networks.rows(16) * np.geomspace(0.01, 10, 16, dtype=np.float32)[:, None]
    stored = weights.T if attributes.get("transA") else weights
    is_gemm = operator == "Gemm"
    first = [] if is_gemm else [helper.make_node("Transpose", ["x"], ["columns"], perm=[1, 0])]
    attributes |= {"transB": 1} if is_gemm else {}
    return networks.model(
        [
            *first,
            helper.make_node(operator, ["w", "x" if is_gemm else "columns"], ["h"], name="product", **attributes),
            helper.make_node("Transpose", ["h"], ["y"], perm=[1, 0]),
        ],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
        [networks.constant("w", np.ascontiguousarray(stored))],
    )


@pytest.mark.parametrize(
    "model",
    [
        product_from_the_left("MatMul"),
        product_from_the_left("Gemm"),
        product_from_the_left("Gemm", transA=1),
    ],
    ids=["MatMul", "Gemm", "transposed"],
)
def test_the_weight_of_a_product_may_come_first(model, tmp_path):
    typed = typed_model(model, tmp_path, "int8", {"x": networks.rows(32)})
    assert typed.report.share == 1
    stored = onnx.load(typed.path).graph.initializer
    assert [list(tensor.dims) for tensor in stored if tensor.name == "w_scale"] == [[16]]
    # By the norm of each output channel: one scale for all would lose the small ones.
    runner = CpuModel(typed.path, optimize=False)
    onnx.save(model, tmp_path / "source.onnx")
    feeds = {"x": networks.rows(32, seed=1)}
    actual, expected = (one.run(["y"], feeds)["y"] for one in (runner, CpuModel(tmp_path / "source.onnx")))
    errors = np.linalg.norm(actual - expected, axis=0) / np.linalg.norm(expected, axis=0)
    assert errors.max() < 0.02


W = (np.random.default_rng(3).standard_normal((16, 16)) / 4).astype(np.float32)
COMPUTED_WEIGHTS = {
    "a norm": (
        [
            helper.make_node("ReduceL2", ["v"], ["norm"], axes=[0], keepdims=1),
            helper.make_node("Div", ["v", "norm"], ["direction"]),
            helper.make_node("Mul", ["direction", "gain"], ["w"]),
        ],
        [networks.constant("v", W), networks.constant("gain", np.linspace(1, 2, 16, dtype=np.float32))],
    ),
    "a low rank": (
        [helper.make_node("MatMul", ["a", "b"], ["more"]), helper.make_node("Add", ["base", "more"], ["w"])],
        [networks.constant("base", W), networks.constant("a", W[:, :2]), networks.constant("b", W[:2])],
    ),
    "a constant of a shape": (
        [
            helper.make_node(
                "ConstantOfShape", ["shape"], ["ones"], value=networks.constant("", np.ones(1, np.float32))
            ),
            helper.make_node("Mul", ["ones", "base"], ["w"]),
        ],
        [networks.constant("shape", np.array([16, 16])), networks.constant("base", W)],
    ),
}


@pytest.mark.parametrize("kind", COMPUTED_WEIGHTS)
def test_weights_that_are_computed_from_constants_are_quantized(kind, tmp_path):
    nodes, constants = COMPUTED_WEIGHTS[kind]
    model = networks.model(
        [*nodes, helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
        constants,
    )
    typed = typed_model(model, tmp_path, "int8", {"x": networks.rows(32)})
    assert typed.report.share == 1
    assert 0 < typed.comparison.relative_error < 0.02


@pytest.mark.parametrize("operator", ["ReduceL2", "ReduceMean", "ReduceSumSquare"])
def test_sums_of_float16_constants_may_be_large_on_the_way(operator, tmp_path):
    """The norm of these weights is 1,200, and their squares are beyond float16; so is the sum of the others."""
    stored = {"ReduceL2": 150.0, "ReduceMean": 2000.0, "ReduceSumSquare": 25.0}[operator]
    half = TensorProto.FLOAT16
    model = networks.model(
        [
            helper.make_node(operator, ["v"], ["size"], axes=[0], keepdims=1),
            helper.make_node("Div", ["v", "size"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [networks.value("x", half, ["batch", 64])],
        [networks.value("y", half, ["batch", 16])],
        [networks.constant("v", np.full((64, 16), stored, np.float16) * np.linspace(0.9, 1, 16, dtype=np.float16))],
    )
    model.opset_import[0].version = 13
    data = {"x": np.random.default_rng(0).standard_normal((16, 64)).astype(np.float16)}
    typed = typed_model(model, tmp_path, "fp16", data)
    assert "Div" not in {node.op_type for node in onnx.load(typed.path).graph.node}  # it was folded
    assert typed.comparison.relative_error < 5e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("opset", [7, 9])
def test_models_whose_initializers_are_inputs(opset, precision, tmp_path):
    """As the third version of the IR wants it, and exporters of that time write it."""
    model = networks.product()
    model.ir_version, model.opset_import[0].version = 3, opset
    model.graph.input.append(networks.value("w", networks.FLOAT, [16, 8]))
    typed = typed_model(model, tmp_path, precision, {"x": networks.rows(16)})
    onnx.checker.check_model(str(typed.path), full_check=True)
    assert typed.report.share == 1
    assert 0 < typed.comparison.relative_error < 0.02


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_what_is_no_tensor_stays_as_it_is(precision, tmp_path):
    """TensorRT refuses it; until then nothing is known of its type."""
    model = networks.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("SequenceConstruct", ["h", "h"], ["s"]),
            helper.make_node("SequenceAt", ["s", "one"], ["y"]),
        ],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
        [networks.constant("w", W), networks.constant("one", np.int64(1))],
    )
    typed = typed_model(model, tmp_path, precision, {"x": networks.rows(16)})
    assert 0 < typed.comparison.relative_error < 0.02
    if precision != "int8":
        assert reasons(typed) == dict.fromkeys(
            ("SequenceConstruct_0", "SequenceAt_0"), "s is no tensor, or its type is not known"
        )


@pytest.mark.slow
def test_where_there_is_nothing_to_quantize_the_error_says_so(tmp_path):
    with pytest.raises(UnsupportedModelError, match="nothing of this model runs in int8: no node is one of Conv"):
        mlflow_trt.save_model(
            elementwise("Sin"), tmp_path / "m", precision="int8", calibration_data={"x": networks.rows(8)}
        )


@pytest.mark.parametrize("value", [-np.inf, np.inf])
def test_infinite_constants_are_not_told_to_be_zero(value, tmp_path):
    """A mask of minus infinity stays what it is in 16 bits, and has no largest value."""
    model = elementwise("Max" if value < 0 else "Min", constant=value)
    model.graph.node[0].input[0] = "h"
    model.graph.node.insert(0, helper.make_node("MatMul", ["x", "w"], ["h"]))
    model.graph.initializer.append(networks.constant("w", W))
    typed = typed_model(model, tmp_path, "fp16", {"x": networks.rows(16)})
    assert not typed.report.kept
    assert typed.report.not_finite == {"c": 1}
    assert "c" not in typed.report.largest


def test_the_model_that_was_given_is_not_changed(tmp_path):
    model = networks.product()
    before = model.SerializeToString()
    typed_model(model, tmp_path, "fp16")
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("model", "factor", "reason"),
    [
        (elementwise("Mul", constant=1000), 100, "y reached .* and float16 ends at 6.55e.04"),
        (elementwise("Add", constant=1e6), 1, "the constant c has 1e.06, and float16 ends"),
        (elementwise("Div", constant=1e-9), 1e-9, "the constant c has 1e-09, which becomes 0"),
        (elementwise("LpNormalization", axis=1), 1000, "it squares values of up to"),
        (elementwise("Sin"), 1000, "it takes angles of up to"),
    ],
    ids=["values", "constant", "epsilon", "squares", "angles"],
)
def test_what_float16_cannot_hold_stays_in_float32(model, factor, reason, tmp_path):
    data = {"x": networks.rows(16) * np.float32(factor)}
    typed = typed_model(model, tmp_path, "fp16", data)
    assert re.search(reason, reasons(typed)["node"])
    assert typed.comparison.relative_error < 1e-6
    assert typed.comparison.outputs[0].infinities == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("count", [1, 3])
def test_means_stay_in_float32(count, precision, tmp_path):
    """TensorRT's parser would multiply their sums with a float32 constant that it reads as 16 bits."""
    typed = typed_model(networks.mean(count), tmp_path, precision, {"x": networks.rows(16)})
    assert "parser misreads a constant of Mean" in reasons(typed)["mean"]
    assert typed.report.changed_nodes == count
    assert 0 < typed.comparison.relative_error < 1e-2


def test_bfloat16_has_the_range_of_float32(tmp_path):
    typed = typed_model(elementwise("Mul", constant=1000), tmp_path, "bf16", {"x": networks.rows(16) * 100})
    assert not typed.report.kept
    assert 0 < typed.comparison.relative_error < 1e-2


@pytest.mark.slow
def test_positions_that_rounding_would_merge_stay_in_float32(tmp_path):
    model = networks.model(
        [
            helper.make_node("Cast", ["position"], ["p"], name="cast", to=networks.FLOAT),
            helper.make_node("Mul", ["p", "c"], ["angle"], name="scale"),
            helper.make_node("Sin", ["angle"], ["y"], name="sin"),
        ],
        [networks.value("position", networks.INT64, ["batch", 1])],
        [networks.value("y", networks.FLOAT, ["batch", 1])],
        [networks.constant("c", np.float32(0.001))],
    )
    typed = typed_model(model, tmp_path, "fp16", {"position": np.arange(4000)[:, None]})
    assert "makes different ones equal" in reasons(typed)["scale"]
    assert typed.comparison.relative_error < 1e-3


def test_control_flow_stays_in_float32_and_still_sees_its_tensors(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Add", ["z", "z"], ["twice"])], "then", [], [networks.value("twice", networks.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["z"], ["minus"])], "else", [], [networks.value("minus", networks.FLOAT, None)]
    )
    model = networks.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["z"], name="product"),
            helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch, else_branch=other),
        ],
        [networks.value("x", networks.FLOAT, ["batch", 16]), networks.value("flag", TensorProto.BOOL, [])],
        [networks.value("y", networks.FLOAT, ["batch", 8])],
        [networks.constant("w", np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32))],
    )
    typed = typed_model(
        model, tmp_path, "fp16", [{"x": networks.rows(4), "flag": np.array(flag)} for flag in (True, False)]
    )
    assert reasons(typed) == {"choice": "it has graphs inside"}
    assert typed.comparison.relative_error < 1e-3


def test_the_user_keeps_nodes_by_name_and_by_operator(tmp_path):
    typed = typed_model(networks.transformer(), tmp_path, "fp16", keep_float32=["Softmax", "layer0_q_node"],
                        batch=4, shapes={"input_ids": ((4, 24),) * 3})  # fmt: skip
    kept = reasons(typed)
    assert kept["layer0_q_node"] == "keep_float32 names it"
    assert kept["layer1_attention_node"] == "keep_float32 names Softmax"
    with pytest.raises(RecipeError, match="keep_float32 names 'Sotfmax', which is neither"):
        typed_model(networks.product(), tmp_path, "fp16", keep_float32="Sotfmax")


@pytest.mark.parametrize("name", ["second", "block"], ids=["a call", "the function"])
def test_a_function_that_is_to_be_kept_is_refused_since_only_its_nodes_can_be(name, tmp_path):
    """It was accepted, and nothing was kept."""
    block = helper.make_function(
        "acme",
        "block",
        ["a", "w"],
        ["b"],
        [helper.make_node("MatMul", ["a", "w"], ["p"]), helper.make_node("Relu", ["p"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    model = networks.product(outputs=16)
    calls = [
        helper.make_node("block", [before, "w"], [after], name=called, domain="acme")
        for before, after, called in (("x", "h", "first"), ("h", "y", "second"))
    ]
    del model.graph.node[:]
    model.graph.node.extend(calls)
    model.functions.append(block)
    model.opset_import.append(helper.make_opsetid("acme", 1))
    with pytest.raises(RecipeError, match=rf"names '{name}', and .* calls a function .* are MatMul, Relu"):
        typed_model(model, tmp_path, "fp16", keep_float32=name)
    kept = typed_model(model, tmp_path, "fp16", keep_float32="Relu").report.kept
    assert [node.operator for node in kept] == ["Relu", "Relu"]


def test_functions_and_constants_of_a_model_are_retyped_too(tmp_path):
    function = helper.make_function(
        "custom", "Scaled", ["a"], ["b"],
        [helper.make_node("Constant", [], ["two"], value_float=2.0), helper.make_node("Mul", ["a", "two"], ["b"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    model = networks.model(
        [helper.make_node("Scaled", ["x"], ["y"], domain="custom")],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("custom", 1))
    typed = typed_model(model, tmp_path, "fp16")
    assert typed.report.node_types == {"float16": 1}


def test_a_model_that_onnx_converts_into_another_one_is_refused(tmp_path):
    """To a newer opset, which bf16 needs, onnx takes the batch axis off the inputs of such a model."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 8]>
        sums (float[1, 2] initial, float[1, 3, 2] x) => (float[1, 2] last, float[1, 3, 2] all) {
            last, all = Scan ("", initial, x) <num_scan_inputs = 1, body = step (float[2] sum, float[2] next)
                => (float[2] sum_out, float[2] scan_out) { sum_out = Add (sum, next) scan_out = Identity (sum_out) }>
        }
    """)
    with pytest.raises(UnsupportedModelError, match=r"opset 8 cannot be raised to 22: .* shape of 'initial'"):
        typed_model(model, tmp_path, "bf16")
    assert typed_model(model, tmp_path, "fp16").comparison.relative_error == 0


def test_calibration_is_tried_on_rows_that_it_has_not_seen(tmp_path, messages):
    """The loudest row is right where its range was seen, and would be cut off to a tenth where it was not."""
    calm = np.clip(networks.rows(32), -2, 2)
    loud = np.concatenate([calm, 10 * calm[:1]])
    unseen = {}
    for name, data in (("calm", calm), ("loud", loud)):
        (tmp_path / name).mkdir()
        conversion = in_int8(networks.product(), tmp_path / name, {"x": data})
        assert conversion.typed.comparison.verdict is Verdict.PASSED
        unseen[name] = conversion.typed.unseen
        told = [remark for remark in conversion.remarks if "may be too few for int8" in remark]
        assert bool(told) is (name == "loud")
    assert unseen["calm"].relative_error < 0.02
    cut = np.clip(loud[::2], -2, 2)
    weights = onnx.numpy_helper.to_array(networks.product().graph.initializer[0])
    expected = np.linalg.norm((loud[::2] - cut) @ weights) / np.linalg.norm(loud[::2] @ weights)
    assert unseen["loud"].relative_error == pytest.approx(expected, rel=0.05)
    assert "33 rows of calibration data may be too few for int8" in messages.text


def test_samples_that_cannot_be_told_apart_are_halved_as_they_are(tmp_path):
    batches = [{"x": scale * networks.rows(4, seed=scale)} for scale in (1, 1, 20)]
    conversion = in_int8(networks.product(4), tmp_path, batches)
    assert conversion.typed.unseen.relative_error > 0.5  # the third batch is with the first, or cut off
    (tmp_path / "one").mkdir()
    assert in_int8(networks.product(8), tmp_path / "one", [{"x": networks.rows(8)}]).typed.unseen is None


def test_a_model_of_int4_weights_is_raised_though_onnxruntime_optimizes_it_to_other_numbers(tmp_path):
    """A relative error of 0.005: it computes such products in int8, and the reference is run node by node."""
    weights = np.random.default_rng(3).integers(-8, 8, (32, 8))
    model = networks.model(
        [
            helper.make_node("DequantizeLinear", ["stored", "scale"], ["w"], axis=0, block_size=16),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [networks.value("x", networks.FLOAT, ["batch", 32])],
        [networks.value("y", networks.FLOAT, ["batch", 8])],
        [
            helper.make_tensor("stored", TensorProto.INT4, weights.shape, weights.ravel().tolist()),
            networks.constant("scale", np.full((2, 8), 0.1, np.float32)),
        ],
    )
    model.opset_import[0].version, model.ir_version = 21, 10
    typed = typed_model(model, tmp_path, "bf16", {"x": networks.rows(16, 32)})
    assert not typed.report.remarks
    assert onnx.load(typed.path).opset_import[0].version == 22


def test_what_onnxruntime_cannot_run_cannot_be_converted(tmp_path):
    model = networks.product()
    model.graph.node[0].domain = "no.such.domain"
    model.opset_import.append(helper.make_opsetid("no.such.domain", 1))
    with pytest.raises(UnsupportedModelError, match=r"values in this model, on which fp16 depends.*Take fp32 or tf32"):
        typed_model(model, tmp_path, "fp16")


def test_external_weights_are_retyped(tmp_path):
    networks.external(tmp_path / "model.onnx")
    source = read_onnx(tmp_path / "model.onnx", tmp_path)
    recipe = Recipe(precision="fp16")
    profiles = resolve_profiles(source, recipe)
    samples = generate_samples(source, profiles)
    typed = maker_for(source, recipe, profiles, tmp_path, samples=samples, tolerance=None, weight_only={}).make({})
    assert typed.report.weight_types == {"float16": 128}
    assert list(typed.files) == ["fp16.onnx"]
    assert 0 < typed.comparison.relative_error < 1e-3


def test_large_models_are_written_again_and_again_to_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_LARGEST_FILE", 1_000)
    path, beside = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    for seed in range(3):
        model = networks.product(width=1024)
        model.graph.initializer[0].CopyFrom(networks.constant("w", networks.rows(1024, 8, seed)))
        write_model(model, tmp_path, path)
        assert beside.stat().st_size == 1024 * 8 * 4
        feeds = {"x": networks.rows(4, 1024)}
        expected = {"y": feeds["x"] @ networks.rows(1024, 8, seed)}
        assert relative_error(CpuModel(path).run(["y"], feeds), expected) < 1e-5
    write_model(networks.product(), tmp_path, path)
    assert not beside.exists()


def test_int8_wants_real_inputs(tmp_path):
    for data in (None, {"x": networks.rows(7)}):
        with pytest.raises(RecipeError, match="pass calibration_data with at least 8 rows"):
            typed_model(networks.product(), tmp_path, "int8", data)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_int8_quantizes_in_the_form_that_tensorrt_fuses(method, tmp_path):
    typed = typed_model(networks.product(), tmp_path, "int8", {"x": networks.rows(64)}, calibration_method=method)
    graph = onnx.load(typed.path).graph
    assert [node.op_type for node in graph.node] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    scales = next(tensor for tensor in graph.initializer if tensor.name == "w_scale")
    assert list(scales.dims) == [8]  # one for each output channel
    assert typed.report.weight_types == {"int8": 128}
    assert typed.report.calibration.method == method
    assert typed.report.calibration.samples == "64 rows of calibration data"
    # Entropy cuts off what is rare, which costs more where values are spread evenly.
    assert 1e-3 < typed.comparison.relative_error < (0.15 if method == "entropy" else 0.03)


def test_a_model_that_is_quantized_already_is_taken_as_it_is(tmp_path):
    quantized = typed_model(networks.product(), tmp_path, "int8", {"x": networks.rows(64)}).path
    source = read_onnx(quantized, tmp_path)
    recipe = Recipe(precision="int8")
    profiles = resolve_profiles(source, recipe)
    samples = generate_samples(source, profiles)
    typed = maker_for(source, recipe, profiles, tmp_path, samples=samples, tolerance=None, weight_only={}).make({})
    assert typed.is_source
    assert "brings its own QuantizeLinear" in typed.report.remarks[0]


def test_fp8_is_refused_for_targets_that_cannot_execute_it(tmp_path):
    source = read(networks.product(), tmp_path)
    data = SampleData(arrays=networks.rows(16), origin=REAL)
    for targets, words in ([], "the default target"), (["sm86", "sm89"], "sm86 cannot"):
        with pytest.raises(RecipeError, match=words) as caught:
            convert_in(tmp_path, source, Recipe(precision="fp8", targets=targets), data=data)
        assert "'sm89'" in str(caught.value)


def test_an_engine_has_one_precision(tmp_path):
    with pytest.raises(RecipeError, match="an engine has one precision; 'best' is for save_model"):
        convert_in(tmp_path, read(networks.product(), tmp_path), Recipe(precision="best"))


class TestWeightsOnly:
    """int8 where the activations cannot be quantized."""

    def test_of_an_operator_that_a_tensorrt_does_not_run_in_int8(self, tmp_path):
        typed = typed_model(
            networks.product(), tmp_path, "int8", {"x": networks.rows(64)}, weight_only={"MatMul": "too old"}
        )
        graph = onnx.load(typed.path).graph
        assert [node.op_type for node in graph.node] == ["DequantizeLinear", "MatMul"]
        assert graph.node[1].input[0] == "x"
        assert [(node.name, node.reason) for node in typed.report.weight_only] == [("product", "too old")]
        assert not typed.report.kept
        assert typed.report.changed_nodes == 0
        assert typed.report.node_types == {"int8 weights": 1}
        assert typed.report.weight_types == {"int8": 128}
        assert "1 node has no more than their weights in int8, and compute in float32: too old" in typed.report.remarks
        both = typed_model(networks.product(), tmp_path, "int8", {"x": networks.rows(64)})
        assert 1e-3 < typed.comparison.relative_error < both.comparison.relative_error

    @pytest.mark.parametrize("precision", ["int8", "fp8"])
    def test_where_an_activation_cannot_be_calibrated(self, precision, tmp_path):
        """Its values were all 0 on the samples, so that nothing is known of their range."""
        typed = typed_model(networks.rarely_alive(), tmp_path, precision, {"x": networks.rows(64)})
        partly = {node.name: node.reason for node in typed.report.weight_only}
        kept = {node.name: node.reason for node in typed.report.kept}
        reason = "dead cannot be calibrated: the largest value seen is 0"
        assert (partly if precision == "int8" else kept) == {"dead_product": reason}
        assert not (kept if precision == "int8" else partly)
        assert typed.report.changed_nodes == 1

    def test_which_is_right_on_values_that_the_samples_did_not_show(self, tmp_path):
        model = networks.rarely_alive()
        typed = typed_model(model, tmp_path, "int8", {"x": networks.rows(64)}, keep_float32="seen_product")
        alive = {"x": networks.rows(64) * 100}
        expected = CpuModel(read(model, tmp_path).path).run(["y"], alive)
        actual = CpuModel(typed.path, optimize=False).run(["y"], alive)
        assert 1e-4 < relative_error(actual, expected) < 0.01

    @pytest.mark.slow
    @pytest.mark.parametrize("model", [CLS, *exhaustive(SILERO)], ids=lambda model: model.name)
    def test_real_convolutions_build_smaller_and_stay_accurate(self, model, tmp_path):
        source = read(model, tmp_path)
        recipe = Recipe(**model.recipe, precision="int8")
        profiles = resolve_profiles(source, recipe)
        samples = cut_samples(calibration_data(model), REAL, source, profiles)
        maker = maker_for(
            source, recipe, profiles, tmp_path, samples=samples, tolerance=Tolerance.default(Precision.INT8),
            weight_only={"Conv": "too old", "ConvTranspose": "too old"},
        )  # fmt: skip
        typed = maker.make({})
        assert typed.comparison.verdict is Verdict.PASSED
        assert typed.comparison.relative_error > 0
        partly = {node.name for node in typed.report.weight_only}
        assert len(partly) >= 4
        nodes = {node.name: node for node in onnx.load(typed.path).graph.node}
        producers = {name: node for node in nodes.values() for name in node.output}
        for name in partly:
            assert producers[nodes[name].input[1]].op_type == "DequantizeLinear"
            assert getattr(producers.get(nodes[name].input[0]), "op_type", "") != "DequantizeLinear"
        interface = Interface(typed.inputs, typed.outputs)
        engine = build_engine(typed.path, tmp_path / "int8.plan", recipe, profiles.profiles, interface=interface).engine
        assert engine.size > 100_000
        assert typed.report.size_after < 0.6 * typed.report.size_before


LEAST_CHANGED = {"fp16": 0.75, "bf16": 0.75, "int8": 0.3, "fp8": 0.2}
"""The share of the nodes that would have the precision if none stayed in float32."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", *exhaustive("bf16", "fp8")])
@pytest.mark.parametrize(
    "model", [CLS, *exhaustive(MAGIKA, DET_DYNAMIC, REC, SILERO, TRANSFORMER)], ids=lambda model: model.name
)
def test_real_models_build_and_stay_accurate(model, precision, tmp_path):
    conversion = converted(model, tmp_path, precision, calibration_data(model))
    typed = conversion.typed
    assert typed.comparison.verdict is Verdict.PASSED
    assert 0 < typed.comparison.relative_error <= Tolerance.default(Precision(precision)).relative_error
    assert conversion.engine.size > 100_000
    candidates = typed.report.changed_nodes + len(typed.report.kept)
    assert typed.report.changed_nodes >= LEAST_CHANGED[precision] * candidates
    assert all(node.reason for node in typed.report.kept)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_magika_keeps_its_labels_in_fp16_and_a_naive_conversion_does_not(tmp_path):
    feeds = MAGIKA.feeds(35)
    conversion = converted(MAGIKA, tmp_path, "fp16", feeds)
    emulation = CpuModel(tmp_path / "emulation.onnx", optimize=False)
    reference = CpuModel(MAGIKA.path())
    name = conversion.source.outputs[0].name
    expected = reference.run([name], feeds)
    actual = emulation.run([name], feeds)
    files = slice(0, 35, 2)  # the others are excerpts, of whose types magika is not sure
    assert (expected[name][files].max(axis=1) > 0.5).all()
    assert np.array_equal(actual[name].argmax(axis=1)[files], expected[name].argmax(axis=1)[files])
    assert any("reached" in node.reason for node in conversion.typed.report.kept)

    # As converters do that look at operators, not at values.
    source = conversion.source
    flat = flatten(RewrittenModel(proto=source.proto, folder=source.path.parent), tmp_path)
    blind = Evidence(samples=conversion.samples, largest={}, not_finite={}, positions={}, share=len)
    naive = HalfPass(FLOAT16).prepare(flat, blind)({})
    assert not naive.report.kept
    onnx.save_model(naive.emulation, tmp_path / "naive.onnx")
    wrong = CpuModel(tmp_path / "naive.onnx", optimize=False).run([name], feeds)
    comparison = compare("naive", "files", [(wrong, expected)], Tolerance.default(Precision.FP16))
    assert comparison.verdict is Verdict.FAILED
    assert not np.array_equal(wrong[name].argmax(axis=1)[files], expected[name].argmax(axis=1)[files])


@pytest.mark.parametrize(
    ("carrier", "stored"),
    [
        (helper.make_node("Identity", ["w0"], ["w"]), np.float32),
        (helper.make_node("Transpose", ["w0"], ["w"], perm=[1, 0]), np.float32),
        (helper.make_node("Cast", ["w0"], ["w"], to=networks.FLOAT), np.float16),
    ],
    ids=["Identity", "Transpose", "Cast"],
)
def test_weights_behind_other_nodes_are_quantized(carrier, stored, tmp_path):
    weights = np.random.default_rng(1).standard_normal((16, 16)).astype(stored)
    model = networks.model(
        [carrier, helper.make_node("MatMul", ["x", "w"], ["y"])],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
        [networks.constant("w0", weights)],
    )
    typed = typed_model(model, tmp_path, "int8", {"x": networks.rows(32)})
    assert typed.report.share == 1
    assert 0 < typed.comparison.relative_error < 0.05


@pytest.mark.parametrize(("precision", "share"), [("int8", 1), ("bf16", 1), ("fp16", 1)])
def test_models_that_come_in_float16(precision, share, tmp_path):
    kind = TensorProto.FLOAT16
    model = networks.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [networks.value("x", kind, ["batch", 16])],
        [networks.value("y", kind, ["batch", 16])],
        [networks.constant("w", networks.rows(16).astype(np.float16))],
    )
    typed = typed_model(model, tmp_path, precision, {"x": networks.rows(32).astype(np.float16)})
    assert typed.report.share == share
    assert typed.comparison.relative_error < 0.05
    assert [spec.dtype for spec in (*typed.inputs, *typed.outputs)] == ["float16", "float16"]


def gelu_between() -> onnx.ModelProto:
    """Products around an operator of which onnx knows no types, and ONNX Runtime does."""
    made = networks.model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
            helper.make_node("Gelu", ["h"], ["g"], name="gelu", domain="com.microsoft"),
            helper.make_node("MatMul", ["g", "w2"], ["y"], name="second"),
        ],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
        [networks.constant(f"w{seed}", networks.rows(16, seed=seed) / 4) for seed in (1, 2)],
    )
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return made


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_comes_after_an_operator_of_another_domain_runs_in_the_precision(precision, tmp_path):
    typed = typed_model(gelu_between(), tmp_path, precision, {"x": networks.rows(32)})
    assert {"first", "second"} <= typed.changed
    assert 0.9 < typed.report.share < 1


def test_a_nan_does_not_hide_what_overflows(tmp_path):
    """The square root of the first row is NaN, and that of the second reaches 2e5 when it is scaled."""
    model = networks.model(
        [
            helper.make_node("Sqrt", ["x"], ["root"], name="root"),
            helper.make_node("Mul", ["root", "scale"], ["scaled"], name="scaled"),
            helper.make_node("Clip", ["scaled", "zero", "one"], ["y"], name="clip"),
        ],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
        [networks.constant(name, np.float32(v)) for name, v in (("scale", 2e5), ("zero", 0), ("one", 1))],
    )
    data = np.abs(networks.rows(16))
    data[0, 0] = -1
    typed = typed_model(model, tmp_path, "fp16", {"x": data})
    assert np.isfinite(typed.report.largest["scaled"])
    assert typed.report.largest["scaled"] > 2e5
    assert typed.report.not_finite["scaled"] == 1
    assert "scaled" in reasons(typed)


def test_where_nothing_runs_in_the_precision_that_is_an_error(tmp_path):
    model = networks.model(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 16])],
    )
    with pytest.raises(UnsupportedModelError, match="nothing of this model runs in int8"):
        mlflow_trt.save_model(model, tmp_path / "m", precision="int8", calibration_data={"x": networks.rows(32)})
    assert not (tmp_path / "m").exists()


def test_where_hardly_anything_does_that_is_a_warning(tmp_path):
    """A product of what is computed, which cannot be quantized, sixteen times as large as the one that can."""
    model = networks.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="small"),
            helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
            helper.make_node("ReduceMean", ["x"], ["shift"], axes=[0]),
            helper.make_node("Add", ["wide", "shift"], ["moved"]),
            helper.make_node("MatMul", ["moved", "t"], ["u"], name="large"),
            helper.make_node("ReduceMean", ["u"], ["m"], keepdims=0),
            helper.make_node("Add", ["h", "m"], ["y"]),
        ],
        [networks.value("x", networks.FLOAT, ["batch", 16])],
        [networks.value("y", networks.FLOAT, ["batch", 8])],
        [
            networks.constant("w", networks.rows(16)[:, :8].copy()),
            networks.constant("wide", networks.rows(2048, seed=3)),
        ],
    )
    conversion = converted_small(model, tmp_path, "int8")
    assert 0 < conversion.typed.report.share < 0.1
    assert re.search(r"only \d\.\d% of this model's arithmetic runs in int8: .* not constant", conversion.remarks[-1])


def converted_small(model, folder, precision) -> Conversion:
    return convert_in(
        folder,
        read(model, folder),
        Recipe(precision=precision),
        data=SampleData(arrays={"x": networks.rows(32)}, origin=REAL),
    )
