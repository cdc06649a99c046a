"""The float32 form of typed models, against the same arithmetic in numpy."""

from __future__ import annotations

import ml_dtypes
import networks
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import mlflow_trt
from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.convert.precision.emulate import emulate, write_emulation
from mlflow_trt.store.folder import read_folder

HALF = TensorProto.FLOAT16


def run(model, feeds, tmp_path):
    path = tmp_path / "emulation.onnx"
    onnx.save_model(emulate(model, tmp_path), path)
    onnx.checker.check_model(str(path), full_check=True)
    return CpuModel(path, optimize=False).run([value.name for value in model.graph.output], feeds)


def squared_and_back(kind=HALF):
    """sqrt(x * x), which is infinite in float16 where x is above 255."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=kind),
        helper.make_node("Mul", ["half", "half"], ["square"]),
        helper.make_node("Sqrt", ["square"], ["root"]),
        helper.make_node("Cast", ["root"], ["y"], to=TensorProto.FLOAT),
    ]
    values = [networks.value(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    return networks.model(nodes, values[:1], values[1:])


def test_what_overflows_in_float16_overflows(tmp_path):
    x = np.float32([0.1, 3.3, 254, 300, 70000])
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
        expected = np.sqrt(half * half).astype(np.float32)
    assert np.isinf(expected[3:]).all()
    assert np.array_equal(run(squared_and_back(), {"x": x}, tmp_path)["y"], expected)


def test_bfloat16_is_rounded_at_every_node(tmp_path):
    x = np.random.default_rng(0).uniform(0.1, 100, 200).astype(np.float32)
    half = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    square = (half * half).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = np.sqrt(square).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(run(squared_and_back(TensorProto.BFLOAT16), {"x": x}, tmp_path)["y"], expected)


def test_inputs_outputs_and_initializers_keep_their_types(tmp_path):
    weights = np.random.default_rng(1).standard_normal((16, 4)).astype(np.float16)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    x, y, z = (networks.value(name, HALF, ["n", width]) for name, width in (("x", 16), ("y", 4), ("z", 4)))
    model = networks.model(nodes, [x], [y, z], [networks.constant("w", weights)])
    given = networks.rows(5).astype(np.float16)
    found = run(model, {"x": given}, tmp_path)
    expected = (given.astype(np.float32) @ weights.astype(np.float32)).astype(np.float16)
    assert found["y"].dtype == np.float16
    assert np.allclose(found["y"].astype(np.float32), expected.astype(np.float32), rtol=1e-3)
    assert np.array_equal(found["z"], -found["y"])


def test_graphs_inside_of_nodes_are_emulated_too(tmp_path):
    def branch(operator, name):
        node = helper.make_node(operator, ["half", "half"], [name])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, HALF, ["n"])])

    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=HALF),
        helper.make_node("If", ["c"], ["h"], then_branch=branch("Mul", "t"), else_branch=branch("Add", "e")),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    inputs = [networks.value("x", TensorProto.FLOAT, ["n"]), networks.value("c", TensorProto.BOOL, [])]
    model = networks.model(nodes, inputs, [networks.value("y", TensorProto.FLOAT, ["n"])])
    x = np.float32([0.1, 300])
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):
        cases = {True: half * half, False: half + half}
    for condition, expected in cases.items():
        found = run(model, {"x": x, "c": np.array(condition)}, tmp_path)["y"]
        assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_typed_model_of_a_folder_gives_what_was_measured_when_it_was_logged(precision, tmp_path):
    data = {"x": networks.rows(32)}
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision=precision, calibration_data=data)
    folder = read_folder(tmp_path / "m")
    (logged,) = folder.record.comparisons
    write_emulation(tmp_path / "m" / folder.record.typed.file, tmp_path / "emulation.onnx")
    got = CpuModel(tmp_path / "emulation.onnx", optimize=False).run(["y"], data)["y"]
    expected = CpuModel(tmp_path / "m" / "model.onnx").run(["y"], data)["y"]
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error == pytest.approx(logged.relative_error, rel=1e-3)


def test_weights_beside_the_model_are_found(tmp_path):
    folder = tmp_path / "typed"
    folder.mkdir()
    weights = np.random.default_rng(1).standard_normal((16, 400)).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=HALF),
        helper.make_node("MatMul", ["half", "w"], ["h"]),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    values = [networks.value(name, TensorProto.FLOAT, ["n", width]) for name, width in (("x", 16), ("y", 400))]
    model = networks.model(nodes, values[:1], values[1:], [networks.constant("w", weights)])
    onnx.save_model(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    write_emulation(folder / "m.onnx", tmp_path / "emulation.onnx")
    x = networks.rows(3)
    got = CpuModel(tmp_path / "emulation.onnx", optimize=False).run(["y"], {"x": x})["y"]
    expected = x.astype(np.float16).astype(np.float32) @ weights.astype(np.float32)
    assert np.allclose(got, expected.astype(np.float16).astype(np.float32), rtol=2e-3, atol=1e-3)
