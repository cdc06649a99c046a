"""Masks of attention in fp16: what stands for minus infinity need not keep attention in float32."""

from __future__ import annotations

import networks
import numpy as np
import pytest
from compare import relative_error
from onnx import TensorProto, checker, helper, numpy_helper

import mlflow_trt
from mlflow_trt.core.accuracy import Verdict
from mlflow_trt.flavor.fetch import read_record

LOWEST = np.finfo(np.float32).min
LENGTH, WIDTH = 10, 16


def attention(*, masked_output: bool = False):
    """Embeddings, self-attention with a mask as BERT's exporters write it, and a projection."""
    random = np.random.default_rng(0)

    def weights(name, *shape):
        return numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) / 4, name)

    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["x"]),
        node("MatMul", ["x", "w_key"], ["key"]),
        node("Transpose", ["key"], ["key_t"], perm=[0, 2, 1]),
        node("MatMul", ["x", "key_t"], ["scores"]),
        node("Cast", ["mask"], ["mask_float"], to=TensorProto.FLOAT),
        node("Sub", ["one", "mask_float"], ["inverse"]),
        node("Mul", ["inverse", "lowest"], ["bias"]),
        node("Unsqueeze", ["bias", "axes"], ["bias_3d"]),
        node("Add", ["scores", "bias_3d"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("MatMul", ["shares", "x"], ["mixed"]),
        node("MatMul", ["mixed", "w_out"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", LENGTH, 4])]
    if masked_output:
        outputs.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, ["N", LENGTH]))
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["N", LENGTH]) for name in ("ids", "mask")],
        outputs,
        [
            weights("table", 30, WIDTH), weights("w_key", WIDTH, WIDTH), weights("w_out", WIDTH, 4),
            numpy_helper.from_array(np.float32(1), "one"), numpy_helper.from_array(LOWEST, "lowest"),
            numpy_helper.from_array(np.array([1]), "axes"),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model, full_check=True)
    return model


def feeds(*, empty: bool = False):
    random = np.random.default_rng(1)
    lengths = random.integers(2, LENGTH + 1, (12, 1))
    lengths[5] = 0 if empty else 3
    return {
        "ids": random.integers(0, 30, (12, LENGTH)),
        "mask": (np.arange(LENGTH) < lengths).astype(np.int64),
    }


def test_attention_runs_in_fp16(tmp_path):
    mlflow_trt.save_model(attention(), tmp_path / "m", precision="fp16", batch=(1, 4, 8), calibration_data=feeds())
    report = read_record(str(tmp_path / "m")).precision_report
    kept = {node.operator for node in report.kept}
    assert not kept & {"Softmax", "Add", "Mul"}
    assert any("the masks lowest are" in remark for remark in report.remarks)
    import onnxruntime

    typed = onnxruntime.InferenceSession(tmp_path / "m" / "typed" / "fp16.onnx")
    source = onnxruntime.InferenceSession(attention().SerializeToString())
    assert relative_error({"y": typed.run(None, feeds())[0]}, {"y": source.run(None, feeds())[0]}) < 5e-3


@pytest.mark.parametrize("case", ["an output", "an empty row"])
def test_masks_that_matter_stay(case, tmp_path):
    model, data = attention(masked_output=case == "an output"), feeds(empty=case == "an empty row")
    mlflow_trt.save_model(model, tmp_path / "m", precision="fp16", batch=(1, 4, 8), calibration_data=data)
    report = read_record(str(tmp_path / "m")).precision_report
    assert {node.operator for node in report.kept} >= {"Softmax", "Add", "Mul"}
    assert not any("the masks lowest are" in remark for remark in report.remarks)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_scores_that_are_minus_infinity_stay_so(precision, tmp_path):
    """Masked classes are an output of the model, and are compared."""
    model = networks.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["scores"]),
            helper.make_node("Where", ["mask", "scores", "low"], ["y"]),
        ],
        [networks.value("x", networks.FLOAT, ["N", WIDTH]), networks.value("mask", TensorProto.BOOL, ["N", 6])],
        [networks.value("y", networks.FLOAT, ["N", 6])],
        [
            networks.constant("w", np.random.default_rng(0).standard_normal((WIDTH, 6)).astype(np.float32)),
            networks.constant("low", np.float32(-np.inf)),
        ],
    )
    random = np.random.default_rng(1)
    samples = {"x": random.standard_normal((12, WIDTH)).astype(np.float32), "mask": random.random((12, 6)) > 0.3}
    samples["mask"][:, 0] = True
    mlflow_trt.save_model(model, tmp_path / "m", precision=precision, batch=(1, 4, 8), calibration_data=samples)
    comparison = read_record(str(tmp_path / "m")).comparisons[0]
    (output,) = comparison.outputs
    assert comparison.verdict is Verdict.PASSED
    assert (output.lost_infinities, output.classes) == (0, 6)
    assert output.values == samples["mask"].sum()
