"""Models that draw random numbers: nothing can be compared with them."""

from __future__ import annotations

import networks
import numpy as np
import onnx
import pytest
from networks import FLOAT, constant, value
from onnx import helper

import mlflow_trt
from mlflow_trt import UnsupportedModelError
from mlflow_trt.store.folder import read_folder

node = helper.make_node


def noisy(scale: float, **attributes: float) -> onnx.ModelProto:
    """y = x @ w + noise * scale."""
    made = networks.product()
    made.graph.node[0].output[0] = "product"
    made.graph.node.extend(
        [
            node("RandomNormalLike", ["product"], ["noise"], name="draw", **attributes),
            node("Mul", ["noise", "scale"], ["scaled"]),
            node("Add", ["product", "scaled"], ["y"]),
        ]
    )
    made.graph.initializer.append(constant("scale", np.float32(scale)))
    return made


def noisy_branch() -> onnx.ModelProto:
    """The noise is drawn in a branch of If."""
    draws = helper.make_graph(
        [node("RandomUniformLike", ["x"], ["o"], name="draw")], "then", [], [value("o", FLOAT, ["batch", 16])]
    )
    other = helper.make_graph([node("Identity", ["x"], ["p"])], "else", [], [value("p", FLOAT, ["batch", 16])])
    return networks.model(
        [node("If", ["true"], ["y"], then_branch=draws, else_branch=other)],
        [value("x", FLOAT, ["batch", 16])],
        [value("y", FLOAT, ["batch", 16])],
        [constant("true", np.bool_(True))],
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", [noisy(1), noisy(1, seed=3.0), noisy_branch()], ids=["any seed", "a seed", "inside"])
def test_a_model_that_draws_random_numbers_is_compared_with_nothing(model, precision, tmp_path):
    """In fp16 it passed: two sessions of ONNX Runtime draw the same numbers, and TensorRT draws others."""
    with pytest.raises(
        UnsupportedModelError, match=r"random numbers at draw \(Random\w+Like\), .* \(y\), .* verify=False"
    ):
        mlflow_trt.save_model(model, tmp_path / "m", precision=precision, input_example=networks.rows(8))
    assert not (tmp_path / "m").exists()


def test_without_a_comparison_it_is_logged(tmp_path):
    mlflow_trt.save_model(noisy(1), tmp_path / "m", precision="fp16", input_example=networks.rows(8), verify=False)
    record = read_folder(tmp_path / "m").record
    assert record.golden is None
    assert not record.comparisons


def test_noise_without_effect_is_none(tmp_path):
    mlflow_trt.save_model(noisy(0), tmp_path / "m", precision="fp16", input_example=networks.rows(8))
    (comparison,) = read_folder(tmp_path / "m").record.comparisons
    assert comparison.verdict == "passed"
