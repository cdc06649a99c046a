"""What is rewritten for TensorRT: the same numbers in other words, or a refusal by name."""

from __future__ import annotations

import networks
import numpy as np
import onnx
import pytest
from compare import relative_error
from helpers import needs_release, prepare, typed_model
from networks import FLOAT, INT64, WEIGHTS, constant, quantized, value
from onnx import TensorProto, helper

import mlflow_trt
from mlflow_trt import RecipeError, UnsupportedModelError
from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.convert.checks import check_nodes
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.convert.onnx.rewrite import rewrite
from mlflow_trt.registry.plan import plan_conversion
from mlflow_trt.store.folder import read_folder

node = helper.make_node


def positive(rows: int) -> dict[str, np.ndarray]:
    return {"x": np.abs(networks.rows(rows)) * 2}


def dequantized(stored, scale, zero) -> onnx.ModelProto:
    return networks.model(
        [node("DequantizeLinear", ["stored", "scale", "zero"], ["w"], axis=1), node("MatMul", ["x", "w"], ["y"])],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [constant("stored", stored), constant("scale", scale), constant("zero", zero)],
    )


def check_same(model, feeds, folder) -> onnx.ModelProto:
    """The rewritten model, which onnx accepts in all its types, and which computes the same."""
    names = [output.name for output in model.graph.output]
    onnx.save_model(model, folder / "source.onnx")
    rewritten = rewrite(model, folder, folder)
    assert rewritten.remarks
    path = folder / "changed.onnx"
    onnx.save_model(rewritten.proto, path)
    onnx.checker.check_model(str(path), full_check=True)
    expected = CpuModel(folder / "source.onnx", optimize=False).run(names, feeds)
    assert relative_error(CpuModel(path, optimize=False).run(names, feeds), expected) < 1e-5
    return rewritten.proto


def types_of(model: onnx.ModelProto) -> set[int]:
    return {tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    "model",
    [
        quantized(np.uint8(0)),
        quantized(None),
        quantized(None, opset=21, output_dtype=TensorProto.UINT8),
        quantized(np.uint8(37), opset=13),
        quantized(np.int8(-128)),
        quantized(np.full(16, 5, np.uint8), scale=np.linspace(0.01, 0.03, 16), axis=1),
        quantized(np.uint8(7), outputs=[value("q", TensorProto.UINT8, ["batch", 16])]),
        quantized(np.int16(0), opset=21, scale=0.0002),
        quantized(np.uint16(30000), opset=21, scale=0.0002),
        quantized(None, opset=21, scale=0.0002, output_dtype=TensorProto.INT16),
    ],
    ids=["zero", "none", "output_dtype", "37", "int8", "channels", "output", "int16", "uint16", "int16 by its name"],
)
def test_quantization_that_tensorrt_lacks_is_float_arithmetic(model, tmp_path):
    """TensorRT would read uint8 as int8 and cut off at 127: a relative error of 0.15 here."""
    changed = check_same(model, positive(64), tmp_path)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {one.op_type for one in changed.graph.node}


@pytest.mark.parametrize("operators", [["Identity"], ["Cast"], ["Identity", "Cast"]])
def test_a_zero_point_may_come_through_nodes(operators, tmp_path):
    model = quantized(np.uint8(37))
    last = "stored"
    for operator in operators:
        attributes = {"to": TensorProto.UINT8} if operator == "Cast" else {}
        model.graph.node.insert(0, node(operator, [last], [f"{last}_{operator}"], **attributes))
        last = f"{last}_{operator}"
    kind = np.int32 if "Cast" in operators else np.uint8
    model.graph.initializer[-1].CopyFrom(constant("stored", kind(37)))
    model.graph.node.sort(key=lambda one: one.op_type not in operators)
    for one in model.graph.node:
        one.input[:] = [last if name == "zero" else name for name in one.input]
    changed = check_same(model, positive(16), tmp_path)
    assert "QuantizeLinear" not in {one.op_type for one in changed.graph.node}


def inside(operator: str, zero) -> onnx.ModelProto:
    """Q and DQ in a branch of If, or in the body of a Loop, with what they read from around it."""
    pair = [
        node("QuantizeLinear", ["v", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        node("MatMul", ["d", "w"], ["o"]),
    ]
    if operator == "If":
        then = helper.make_graph(pair, "then", [], [value("o", FLOAT, ["batch", 16])])
        other = helper.make_graph([node("Identity", ["v"], ["p"])], "else", [], [value("p", FLOAT, ["batch", 16])])
        nodes = [
            node("Relu", ["x"], ["v"]),
            node("ReduceMax", ["v"], ["largest"], keepdims=0),
            node("Less", ["small", "largest"], ["condition"]),
            node("If", ["condition"], ["y"], then_branch=then, else_branch=other),
        ]
    else:
        body = helper.make_graph(
            [node("Identity", ["c"], ["goes_on"]), *pair],
            "body",
            [value("i", INT64, []), value("c", TensorProto.BOOL, []), value("v", FLOAT, ["batch", 16])],
            [value("goes_on", TensorProto.BOOL, []), value("o", FLOAT, ["batch", 16])],
        )
        nodes = [node("Loop", ["count", "true", "x"], ["y"], body=body)]
    return networks.model(
        nodes,
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [
            constant("scale", np.float32(0.05)),
            constant("zero", zero),
            constant("w", WEIGHTS),
            constant("small", np.float32(-1)),
            constant("count", np.int64(2)),
            constant("true", np.bool_(True)),
        ],
    )


@pytest.mark.parametrize("zero", [np.uint8(0), np.uint8(128), np.int8(5)], ids=["zero", "middle", "int8"])
@pytest.mark.parametrize("operator", ["If", "Loop"])
def test_quantization_in_graphs_inside_of_nodes(operator, zero, tmp_path):
    check_same(inside(operator, zero), positive(16), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["If", "Loop"])
def test_engines_are_built_of_quantization_inside_of_nodes(operator, tmp_path):
    shapes = {"x": ((1, 16), (8, 16), (8, 16))}
    mlflow_trt.save_model(
        inside(operator, np.uint8(0)), tmp_path / "model", shapes=shapes, calibration_data=positive(8)
    )
    typed = CpuModel(tmp_path / "model" / "typed" / "fp32.onnx").run(["y"], positive(8))
    onnx.save_model(inside(operator, np.uint8(0)), tmp_path / "source.onnx")
    assert relative_error(typed, CpuModel(tmp_path / "source.onnx", optimize=False).run(["y"], positive(8))) < 1e-6


def in_blocks(kind: int, low: int, high: int, zero: int) -> onnx.ModelProto:
    """Weights with a scale for each block of four."""
    random = np.random.default_rng(2)
    scales = random.uniform(0.02, 0.04, (4, 16)).astype(np.float32)
    model = networks.model(
        [
            node("DequantizeLinear", ["stored", "scale", "zero"], ["w"], axis=0, block_size=4),
            node("MatMul", ["x", "w"], ["y"], name="product"),
        ],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [
            helper.make_tensor("stored", kind, (16, 16), random.integers(low, high, 256).tolist()),
            constant("scale", scales),
            helper.make_tensor("zero", kind, (4, 16), [zero] * 64),
        ],
    )
    model.opset_import[0].version, model.ir_version = 21, 10
    return model


BLOCKS = {
    "int4": in_blocks(TensorProto.INT4, -7, 8, 0),
    "uint4": in_blocks(TensorProto.UINT4, 0, 16, 8),
    "int8": in_blocks(TensorProto.INT8, -127, 128, 0),
    "uint8": in_blocks(TensorProto.UINT8, 0, 256, 128),
}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_in_blocks(kind, precision, tmp_path):
    typed = typed_model(BLOCKS[kind], tmp_path, precision, {"x": networks.rows(32)})
    assert typed.report.share == 1
    assert 0 < typed.comparison.relative_error < 0.02
    onnx.checker.check_model(str(typed.path), full_check=True)


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_weights_that_come_quantized_are_quantized_anew_where_what_they_meet_is_not(opset, tmp_path):
    """That is uint8 with a zero point, which becomes float arithmetic. onnx's reference dequantizes since opset 19."""
    model = quantized(np.uint8(37), opset=opset)
    model.graph.node.insert(0, node("DequantizeLinear", ["stored", "scales", "zeros"], ["weights"], axis=1))
    model.graph.node[-1].input[1] = "weights"
    model.graph.initializer.extend(
        [
            constant("stored", np.random.default_rng(0).integers(-127, 128, (16, 16)).astype(np.int8)),
            constant("scales", np.linspace(0.01, 0.03, 16).astype(np.float32)),
            constant("zeros", np.zeros(16, np.int8)),
        ]
    )
    typed = typed_model(model, tmp_path, "int8", positive(32))
    assert typed.report.share > 0.5
    assert 0 < typed.comparison.relative_error < 0.02


def of_microsoft(kind: int, zero: int, low: int, high: int, *, opset: int, activation: int = 0) -> onnx.ModelProto:
    """Activations in int8 and weights in `kind`, by Q/DQ of ONNX Runtime's own domain.

    Its quantizer takes that for 4 and 16 bits before opset 21.
    """
    made = quantized(np.int8(activation), opset=opset, scale=0.03)
    made.graph.node.insert(0, node("DequantizeLinear", ["stored", "scales", "zeros"], ["weights"], axis=1))
    made.graph.node[-1].input[1] = "weights"
    for one in made.graph.node[:-1]:
        one.domain = "com.microsoft"
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    stored = np.random.default_rng(0).integers(low, high + 1, 256)
    made.graph.initializer.extend(
        [
            helper.make_tensor("stored", kind, (16, 16), stored.tolist()),
            constant("scales", np.linspace(0.01, 0.03, 16).astype(np.float32)),
            helper.make_tensor("zeros", kind, (16,), [zero] * 16),
        ]
    )
    return made


INT8, INT4, UINT4 = TensorProto.INT8, TensorProto.INT4, TensorProto.UINT4


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize(
    "weights",
    [(INT8, 0, -127, 127), (INT8, 5, -100, 100), (INT4, 3, -4, 7), (UINT4, 8, 1, 15)],
    ids=["int8", "int8 with a zero point", "int4", "uint4"],
)
def test_the_domain_of_onnxruntime_stays_where_onnx_has_no_such_operator(weights, opset, tmp_path):
    rewritten = check_same(of_microsoft(*weights, opset=opset, activation=-7), positive(8), tmp_path)
    (reader,) = (one for one in rewritten.graph.node if one.op_type == "DequantizeLinear")
    # Of opset 11, ONNX's has no axis.
    has_it = opset >= (13 if weights[0] == INT8 else 21)
    assert reader.domain == ("" if has_it else "com.microsoft")


@pytest.mark.parametrize("opset", [13, 21])
def test_what_that_domain_quantizes_is_counted(opset, tmp_path):
    model = of_microsoft(INT8, 0, -127, 127, opset=opset)
    assert typed_model(model, tmp_path, "int8", positive(32)).report.share == 1


@pytest.mark.parametrize("weights", [(INT8, 0, -127, 127), (INT4, 0, -7, 7), (UINT4, 8, 1, 15)])
def test_weights_of_that_domain_are_quantized_anew(weights, tmp_path):
    typed = typed_model(of_microsoft(*weights, opset=17, activation=-7), tmp_path, "int8", positive(32))
    assert typed.report.share > 0.5
    assert 0 < typed.comparison.relative_error < 0.02


@pytest.mark.parametrize("where", ["output", "between"])
def test_a_model_that_computes_nothing_quantized_is_quantized(where, tmp_path):
    """Q/DQ for an output alone, or around what only moves values, leave the product in float."""
    if where == "output":
        nodes = [node("MatMul", ["x", "w"], ["h"]), node("QuantizeLinear", ["h", "scale", "zero"], ["y"])]
    else:
        nodes = [
            node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            node("Reshape", ["q", "shape"], ["moved"]),
            node("DequantizeLinear", ["moved", "scale", "zero"], ["d"]),
            node("MatMul", ["d", "w"], ["y"]),
        ]
    model = networks.model(
        nodes,
        [value("x", FLOAT, ["batch", 16])],
        [value("y", TensorProto.INT8 if where == "output" else FLOAT, ["batch", 16])],
        [
            constant("w", WEIGHTS),
            constant("scale", np.float32(0.05)),
            constant("zero", np.int8(0)),
            constant("shape", np.array([-1, 16])),
        ],
    )
    typed = typed_model(model, tmp_path, "int8", {"x": networks.rows(32)})
    assert typed.report.share == 1
    assert 0 < typed.comparison.relative_error < 0.05


def test_uint8_around_128_is_int8(tmp_path):
    changed = check_same(quantized(np.uint8(128)), {"x": networks.rows(64)}, tmp_path)
    assert [one.op_type for one in changed.graph.node] == ["QuantizeLinear", "DequantizeLinear", "MatMul"]
    assert types_of(changed) == {TensorProto.FLOAT, TensorProto.INT8}


@pytest.mark.parametrize(("zero", "stored_as"), [(128, TensorProto.INT8), (0, TensorProto.FLOAT)])
def test_weights_of_uint8_are_int8_where_they_fit(zero, stored_as, tmp_path):
    stored = np.random.default_rng(1).integers(0, 256, (16, 16)).astype(np.uint8)
    model = dequantized(stored, np.linspace(0.01, 0.03, 16).astype(np.float32), np.full(16, zero, np.uint8))
    assert stored_as in types_of(check_same(model, positive(8), tmp_path))
    assert TensorProto.UINT8 not in types_of(check_same(model, positive(8), tmp_path))


def test_what_nothing_can_be_made_of_is_refused_by_name(tmp_path):
    model = quantized(np.uint8(0))
    model.graph.node.insert(1, node("Reshape", ["q", "shape"], ["moved"], name="between"))
    model.graph.node[2].input[0] = "moved"
    model.graph.initializer.append(constant("shape", np.array([0, 16])))
    with pytest.raises(UnsupportedModelError, match=r"uint8 .* quantize \(QuantizeLinear\).*between \(Reshape\) reads"):
        rewrite(model, tmp_path, tmp_path)


def test_biases_of_int32_are_stored_as_numbers(tmp_path):
    model = networks.model(
        [node("DequantizeLinear", ["stored", "scale"], ["bias"]), node("Add", ["x", "bias"], ["y"])],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [constant("stored", np.arange(16, dtype=np.int32) * 100), constant("scale", np.float32(0.001))],
    )
    assert [one.op_type for one in check_same(model, positive(8), tmp_path).graph.node] == ["Add"]


def test_sparse_weights_are_dense(tmp_path):
    dense = np.eye(16, dtype=np.float32)[np.random.default_rng(0).permutation(16)]
    places = np.flatnonzero(dense)
    sparse = onnx.SparseTensorProto(dims=[16, 16])
    sparse.values.CopyFrom(constant("w", dense.ravel()[places]))
    sparse.indices.CopyFrom(constant("places", places))
    model = networks.product(width=16)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 16
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(sparse)
    check_same(model, positive(8), tmp_path)


def test_group_normalization_before_opset_21(tmp_path):
    model = networks.model(
        [node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2, epsilon=1e-3)],
        [value("x", FLOAT, ["batch", 4, 6, 6])],
        [value("y", FLOAT, ["batch", 4, 6, 6])],
        [constant("scale", np.float32([1.5, 0.5])), constant("bias", np.float32([0.1, 0.3]))],
    )
    model.opset_import[0].version = 18
    images = np.random.default_rng(0).standard_normal((3, 4, 6, 6)).astype(np.float32)
    check_same(model, {"x": images}, tmp_path)
    assert read_onnx(model, tmp_path).inputs[0].name == "x"  # onnx.checker calls the operator deprecated


def test_a_loop_without_a_condition(tmp_path):
    body = helper.make_graph(
        [node("Identity", ["c"], ["goes_on"]), node("Add", ["v", "one"], ["next"])],
        "body",
        [value("i", INT64, []), value("c", TensorProto.BOOL, []), value("v", FLOAT, [4])],
        [value("goes_on", TensorProto.BOOL, []), value("next", FLOAT, [4])],
    )
    model = networks.model(
        [node("Loop", ["count", "", "x"], ["y"], body=body)],
        [value("x", FLOAT, [4])],
        [value("y", FLOAT, [4])],
        [constant("count", np.int64(3)), constant("one", np.ones(4, np.float32))],
    )
    check_same(model, {"x": np.arange(4, dtype=np.float32)}, tmp_path)


def test_functions_that_quantize_are_written_out(tmp_path):
    function = helper.make_function(
        "mine",
        "Rounded",
        ["a"],
        ["r"],
        [
            node("Constant", [], ["s"], value=constant("", np.float32(0.05))),
            node("Constant", [], ["z"], value=constant("", np.int8(0))),
            node("QuantizeLinear", ["a", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "s", "z"], ["r"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    model = networks.model(
        [
            node("Rounded", ["x"], ["h"], domain="mine"),
            node("MatMul", ["h", "w"], ["g"]),
            node("Rounded", ["g"], ["y"], domain="mine"),
        ],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [constant("w", WEIGHTS)],
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.functions.append(function)
    assert not check_same(model, positive(8), tmp_path).functions


def own_relu(name: str) -> onnx.ModelProto:
    """A function of the model that has the name of an operator and does something else; another one calls it."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    negate = helper.make_function("own", name, ["a"], ["b"], [node("Neg", ["a"], ["b"])], imports)
    call = helper.make_function("own", "Twice", ["a"], ["c"], [
        node(name, ["a"], ["b"], domain="own"), node("Add", ["a", "b"], ["zero"]), node("Sub", ["b", "zero"], ["c"]),
    ], imports)  # fmt: skip
    model = networks.model(
        [node("Twice", ["x"], ["y"], domain="own")],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [],
    )
    model.functions.extend([negate, call])
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


@pytest.mark.parametrize("name", ["Relu", "Softmax", "MatMulNBits"])
def test_functions_with_names_of_operators_are_written_out(name, tmp_path):
    """TensorRT would compute the operator of that name."""
    rewritten = check_same(own_relu(name), positive(8), tmp_path)
    assert not rewritten.functions
    assert {one.op_type for one in rewritten.graph.node} == {"Neg", "Add", "Sub"}


def test_other_functions_stay(tmp_path):
    assert not rewrite(own_relu("Negate"), tmp_path, tmp_path).remarks


@pytest.mark.parametrize(
    ("domain", "advice"), [("acme", "other names"), ("com.microsoft.nchwc", "before ONNX Runtime optimized it")]
)
@pytest.mark.parametrize("where", ["graph", "branch"])
def test_operators_of_other_domains_are_not_taken_for_those_of_onnx(where, domain, advice):
    """TensorRT's parser looks at their names alone."""
    model = networks.product()
    own = node("Relu", ["y"], ["z"], name="own", domain=domain)
    if where == "branch":
        body = helper.make_graph([own], "body", [], [value("z", FLOAT, ["batch", 8])])
        model.graph.node.append(node("If", ["condition"], ["chosen"], then_branch=body, else_branch=body))
    else:
        model.graph.node.append(own)
    with pytest.raises(UnsupportedModelError, match=rf"own \(Relu\).* of {domain}, .*{advice}") as caught:
        check_nodes(model)
    assert caught.value.nodes == ("own (Relu)",)


@pytest.mark.parametrize("operator", [("Gelu", "com.microsoft"), ("Frobnicate", "acme")])
def test_operators_that_are_taken_for_no_other_are_left_to_the_parser(operator):
    model = networks.product()
    model.graph.node.append(node(operator[0], ["y"], ["z"], domain=operator[1]))
    check_nodes(model)


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        ([node("SequenceConstruct", ["y"], ["s"]), node("SequenceAt", ["s", "i"], ["z"], name="at")],
         ["unnamed (SequenceConstruct)", "at (SequenceAt)"]),
        ([node("Constant", [], ["s"], value_strings=["a", "b"]), node("Shape", ["s"], ["z"])], ["unnamed (Constant)"]),
        ([node("Shape", ["stored"], ["z"])], ["stored (initializer)"]),
    ],
)  # fmt: skip
def test_what_is_no_tensor_of_numbers_is_refused_by_name(nodes, named):
    model = networks.product()
    model.graph.node.extend(nodes)
    if "stored" in nodes[0].input:
        model.graph.initializer.append(constant("stored", np.array(["a"])))
    with pytest.raises(UnsupportedModelError, match="tensors of numbers alone, and no sequences, optional") as caught:
        check_nodes(model)
    assert list(caught.value.nodes) == named


def test_a_function_that_nobody_calls_may_have_sequences():
    model = networks.product()
    opsets = [helper.make_opsetid("", 17)]
    listed = helper.make_function("own", "Listed", ["a"], ["s"], [node("SequenceConstruct", ["a"], ["s"])], opsets)
    model.functions.append(listed)
    check_nodes(model)
    model.graph.node.append(node("Listed", ["y"], ["s"], domain="own"))
    with pytest.raises(UnsupportedModelError, match=r"unnamed \(SequenceConstruct\)"):
        check_nodes(model)


def test_an_output_that_is_an_input_is_refused():
    model = networks.product()
    model.graph.output.append(model.graph.input[0])
    with pytest.raises(UnsupportedModelError, match="output 'x' is an input, too"):
        check_nodes(model)
    model = networks.product()
    model.graph.output.append(model.graph.output[0])
    with pytest.raises(UnsupportedModelError, match="2 outputs of the name 'y'"):
        check_nodes(model)


def test_engines_are_built_of_what_was_rewritten(tmp_path):
    """Through TensorRT, whose network has the inputs and outputs that the record has."""
    model = quantized(np.uint8(0), outputs=[value("w", FLOAT, [16, 16])])
    mlflow_trt.save_model(model, tmp_path / "model", precision="fp32", shapes={"x": ((1, 16), (8, 16), (8, 16))})
    typed = CpuModel(tmp_path / "model" / "typed" / "fp32.onnx").run(["y", "w"], positive(8))
    onnx.save_model(model, tmp_path / "source.onnx")
    assert relative_error(typed, CpuModel(tmp_path / "source.onnx").run(["y", "w"], positive(8))) < 1e-6


@pytest.mark.parametrize("opset", [17, 19, pytest.param(23, marks=needs_release("onnxruntime", "1.22"))])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_models_that_bring_int8_stay_valid_in_16_bits(precision, opset, tmp_path):
    typed = typed_model(quantized(np.int8(0), opset=opset), tmp_path, precision, {"x": networks.rows(32)})
    onnx.checker.check_model(str(typed.path), full_check=True)
    assert typed.report.share == 1
    assert typed.comparison.relative_error < 0.02


def resized(operator: str, opset: int, mode: str) -> onnx.ModelProto:
    made = networks.model(
        [
            node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
            node(operator, ["c", "scales"], ["y"], mode=mode),
        ],
        [value("x", FLOAT, ["batch", 4, 6, 6])],
        [value("y", FLOAT, ["batch", 4, 12, "wide"])],
        [
            constant("k", (np.random.default_rng(2).standard_normal((4, 4, 3, 3)) / 6).astype(np.float32)),
            constant("scales", np.float32([1, 1, 2, 2])),
        ],
    )
    made.opset_import[0].version = opset
    return made


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(("operator", "opset"), [("Resize", 10), ("Upsample", 9)])
def test_raising_the_opset_does_not_move_pixels(operator, opset, mode, precision, tmp_path):
    """onnx's converter takes the coordinates of the later opset: half a pixel off, a relative error of 0.5."""
    data = {"x": np.random.default_rng(0).standard_normal((16, 4, 6, 6)).astype(np.float32)}
    typed = typed_model(resized(operator, opset, mode), tmp_path, precision, data)
    assert typed.comparison.relative_error < 0.03
    assert typed.report.share > 0.5


def test_raising_the_opset_keeps_what_hardmax_looks_at(tmp_path):
    model = networks.model(
        [
            node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
            node("Hardmax", ["c"], ["h"], axis=1),
            node("Add", ["h", "c"], ["y"]),
        ],
        [value("x", FLOAT, ["batch", 4, 6, 6])],
        [value("y", FLOAT, ["batch", 4, 6, 6])],
        [constant("k", (np.random.default_rng(2).standard_normal((4, 4, 3, 3)) / 6).astype(np.float32))],
    )
    model.opset_import[0].version = 11
    data = {"x": np.random.default_rng(0).standard_normal((16, 4, 6, 6)).astype(np.float32)}
    assert typed_model(model, tmp_path, "int8", data).comparison.relative_error < 0.3


@pytest.mark.parametrize(("operator", "opset"), [("Upsample", 9), ("Resize", 10), ("Hardmax", 11)])
def test_raising_the_opset_keeps_what_graphs_inside_of_nodes_compute(operator, opset, tmp_path):
    size = 6 if operator == "Hardmax" else 12
    inputs, attributes = (["c"], {"axis": 1}) if operator == "Hardmax" else (["c", "scales"], {"mode": "linear"})
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(operator, inputs, [name], **attributes)], name, [], [value(name, FLOAT, ["batch", 4, size, size])]
        )
        for name in ("then", "else")
    }
    model = networks.model(
        [
            node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
            node("ReduceMax", ["c"], ["largest"], keepdims=0),
            node("Less", ["small", "largest"], ["condition"]),
            node("If", ["condition"], ["y"], **branches),
        ],
        [value("x", FLOAT, ["batch", 4, 6, 6])],
        [value("y", FLOAT, ["batch", 4, size, size])],
        [
            constant("k", (np.random.default_rng(2).standard_normal((4, 4, 3, 3)) / 6).astype(np.float32)),
            constant("scales", np.float32([1, 1, 2, 2])),
            constant("small", np.float32(-1)),
        ],
    )
    model.opset_import[0].version = opset
    data = {"x": np.random.default_rng(0).standard_normal((16, 4, 6, 6)).astype(np.float32)}
    assert typed_model(model, tmp_path, "int8", data).comparison.relative_error < 0.3


def test_the_opset_is_raised_with_weights_in_files_and_sizes_that_become_known(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    model = networks.product(width=64)
    model.opset_import[0].version = 11
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "unknown"
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    mlflow_trt.save_model(
        tmp_path / "m.onnx", tmp_path / "model", precision="int8", calibration_data={"x": networks.rows(32, 64)}
    )
    stored = onnx.load(tmp_path / "model" / "typed" / "int8.onnx")
    assert stored.opset_import[0].version == 13
    assert TensorProto.INT8 in types_of(stored)


def test_a_plan_is_made_of_what_is_rewritten(tmp_path):
    """Of uint8 becomes float arithmetic, which int8 has to be calibrated for; and what is refused is refused here."""
    onnx.save_model(quantized(np.uint8(0)), tmp_path / "m.onnx")
    plan = plan_conversion(tmp_path / "m.onnx", prepare(precision="fp16"), path=tmp_path / "out")
    assert "quantize (QuantizeLinear) quantizes to uint8" in plan.remarks[-1]
    with pytest.raises(RecipeError, match="int8 is calibrated on real inputs"):
        plan_conversion(tmp_path / "m.onnx", prepare(precision="int8"), path=tmp_path / "out")
    model = quantized(np.uint8(0))
    model.graph.node[2].input[0] = "q"
    model.graph.node[2].op_type = "MatMulInteger"
    onnx.save_model(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="MatMulInteger"):
        plan_conversion(tmp_path / "m.onnx", prepare(), path=tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "stored_as"),
    [
        (BLOCKS["uint4"], TensorProto.INT4),
        (in_blocks(TensorProto.INT4, 0, 8, 5), TensorProto.INT4),
        (in_blocks(TensorProto.UINT4, 0, 16, 0), TensorProto.INT8),
        (in_blocks(TensorProto.UINT8, 0, 256, 0), TensorProto.FLOAT),
    ],
    ids=["uint4", "int4 with a zero point", "uint4 from 0", "uint8 from 0"],
)
def test_weights_of_4_bits_stay_narrow_where_they_fit(model, stored_as, tmp_path):
    """TensorRT has int4 with the zero point 0, and no uint4."""
    assert types_of(check_same(model, positive(8), tmp_path)) <= {TensorProto.FLOAT, stored_as}


def packed(*, bits=4, width=64, opset=21, zeros=False, bias=False, dtype=np.float32) -> onnx.ModelProto:
    """A product with weights that ONNX Runtime packs into bytes, in blocks of 32; the last one may not be full."""
    random, outputs, blocks = np.random.default_rng(1), 6, -(-width // 32)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    stored = {
        "stored": random.integers(0, 256, (outputs, blocks, 4 * bits)).astype(np.uint8),
        "scales": random.uniform(0.01, 0.1, outputs * blocks).astype(dtype),
        "zeros": random.integers(0, 256, outputs * -(-blocks * bits // 8)).astype(np.uint8),
        "bias": random.standard_normal(outputs).astype(dtype),
    }
    inputs = ["x", "stored", "scales", "zeros" if zeros else "", "", "bias" if bias else ""]
    attributes = {"K": width, "N": outputs, "bits": bits, "block_size": 32}
    made = networks.model(
        [node("MatMulNBits", inputs, ["y"], name="product", domain="com.microsoft", **attributes)],
        [value("x", kind, ["batch", width])],
        [value("y", kind, ["batch", outputs])],
        [constant(name, array) for name, array in stored.items() if name in inputs],
    )
    made.opset_import[0].version, made.ir_version = opset, 10
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return made


@pytest.mark.parametrize(
    ("model", "is_int4"),
    [
        (packed(), True),
        (packed(bias=True), True),
        (packed(zeros=True), False),
        (packed(width=96, zeros=True), False),
        pytest.param(packed(bits=8), False, marks=needs_release("onnxruntime", "1.22")),
        pytest.param(packed(bits=8, zeros=True, bias=True), False, marks=needs_release("onnxruntime", "1.22")),
        (packed(width=80), False),
        (packed(opset=17), False),
    ],
    ids=[
        "int4",
        "bias",
        "zero points",
        "odd zero points",
        "8 bits",
        "8 bits, all",
        "a block that is not full",
        "opset 17",
    ],
)
def test_weights_that_onnxruntime_packs_are_those_of_a_product(model, is_int4, tmp_path):
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    changed = check_same(model, {"x": networks.rows(16, width)}, tmp_path)
    assert (TensorProto.INT4 in types_of(changed)) is is_int4
    assert "MatMulNBits" not in {one.op_type for one in changed.graph.node}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_packed_weights_are_converted(precision, tmp_path):
    """TensorRT-RTX asks for a plugin that it does not have."""
    data = {"x": networks.rows(16, 64)}
    mlflow_trt.save_model(packed(), tmp_path / "m", precision=precision, calibration_data=data)
    (comparison,) = read_folder(tmp_path / "m").record.comparisons
    assert comparison.verdict == "passed"


def test_packed_weights_of_float16_are_converted(tmp_path):
    model = packed(dtype=np.float16)
    onnx.save_model(model, tmp_path / "source.onnx")
    feeds = {"x": networks.rows(16, 64).astype(np.float16)}
    mlflow_trt.save_model(model, tmp_path / "m", input_example=feeds)
    typed = CpuModel(tmp_path / "m" / read_folder(tmp_path / "m").record.typed.file, optimize=False).run(["y"], feeds)
    expected = CpuModel(tmp_path / "source.onnx", optimize=False).run(["y"], feeds)
    assert relative_error(typed, expected) < 1e-3


@pytest.mark.parametrize("fault", ["scales that come in", "too few scales", "no size"])
def test_packed_weights_that_cannot_be_read_are_left_to_the_parser_which_refuses_them(fault, tmp_path):
    model = packed()
    scales = model.graph.initializer[1]
    if fault == "scales that come in":
        model.graph.input.append(value("scales", FLOAT, scales.dims))
        model.graph.initializer.remove(scales)
    elif fault == "too few scales":
        scales.CopyFrom(constant("scales", np.ones(3, np.float32)))
    else:
        attributes = [attribute for attribute in model.graph.node[0].attribute if attribute.name != "K"]
        del model.graph.node[0].attribute[:]
        model.graph.node[0].attribute.extend(attributes)
    with pytest.raises(UnsupportedModelError, match=r"product \(MatMulNBits\).*other operators there"):
        mlflow_trt.save_model(model, tmp_path / "m", batch=(1, 4, 8), verify=False)
