"""Bytes that are moved before they are cast: TensorRT takes them the other way round."""

from __future__ import annotations

import networks
import numpy as np
import pytest
from compare import relative_error
from onnx import TensorProto, checker, helper, numpy_helper

import mlflow_trt
from mlflow_trt import UnsupportedModelError
from mlflow_trt.convert.onnx.byte_inputs import cast_bytes_first

WEIGHTS = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)


def images_first(*moves, to=TensorProto.FLOAT, ends=("scaled",)):
    """Images as files have them, [N, H, W, C], moved and cast, and a convolution."""
    nodes, last = [], "image"
    for number, (operator, attributes) in enumerate(moves):
        nodes.append(helper.make_node(operator, [last], [f"moved_{number}"], **attributes))
        last = f"moved_{number}"
    nodes += [
        helper.make_node("Cast", [last], ["wide"], to=to),
        helper.make_node("Cast", ["wide"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "weights"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["features"], ["y"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "images",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(np.float32(255), "scale")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model, full_check=True)
    return model


TRANSPOSE = ("Transpose", {"perm": [0, 3, 1, 2]})


@pytest.mark.parametrize("to", [TensorProto.FLOAT, TensorProto.INT64], ids=["float", "int64"])
def test_the_result_is_the_same(to, tmp_path):
    source = images_first(TRANSPOSE, ("Identity", {}), to=to)
    changed = cast_bytes_first(source)
    assert changed is not source
    assert changed.graph.node[0].op_type == "Cast"
    checker.check_model(changed, full_check=True)
    mlflow_trt.save_model(source, tmp_path / "model", batch=(1, 2, 4))  # builds an engine
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    import onnxruntime

    expected, actual = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": images})[0]
        for model in (source, changed)
    )
    assert np.array_equal(expected, actual)
    with mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime") as session:
        assert relative_error(session.run({"image": images}), {"y": expected}) < 1e-6


def test_what_computes_with_bytes_is_left_alone(tmp_path):
    source = images_first(TRANSPOSE, ("Identity", {}))
    doubled = helper.make_node("Add", ["moved_0", "moved_0"], ["moved_1"])  # 200 + 200 is 144 in bytes
    source.graph.node[1].CopyFrom(doubled)
    assert cast_bytes_first(source) is source
    with pytest.raises(UnsupportedModelError):
        mlflow_trt.save_model(source, tmp_path / "model")


def test_what_is_cast_at_once_is_left_alone():
    source = images_first()
    assert cast_bytes_first(source) is source
    assert cast_bytes_first(product := networks.product()) is product
