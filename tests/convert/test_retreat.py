"""Retreat to float32 where TensorRT resists a precision: how many builds it takes, and what it gives up."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import read
from networks import FLOAT, constant, model, value
from onnx import helper

from mlflow_trt.convert.conversion import choose_samples
from mlflow_trt.convert.engine.builder import build_engine
from mlflow_trt.convert.engine.fallback import build_with_retreat
from mlflow_trt.convert.onnx.model import sha256_of
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.resolve_profiles import resolve_profiles
from mlflow_trt.convert.typed_model.maker import maker_for
from mlflow_trt.core.types import Interface
from mlflow_trt.errors import BuildError

RANDOM = np.random.default_rng(4)


def weights(*shape):
    return (RANDOM.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def chain(*operators: str) -> onnx.ModelProto:
    """Convolutions one after the other, of these operators, each followed by Relu."""
    nodes, tensors, last = [], [], "x"
    for number, operator in enumerate(operators):
        tensors.append(constant(f"w{number}", weights(4, 4, 1, 1)))
        nodes += [
            helper.make_node(operator, [last, f"w{number}"], [f"c{number}"], name=f"{operator.lower()}_{number}x"),
            helper.make_node("Relu", [f"c{number}"], [f"r{number}"], name=f"relu_{number}x"),
        ]
        last = f"r{number}"
    nodes[-1].output[0] = "y"
    return model(nodes, [value("x", FLOAT, ["N", 4, 6, 6])], [value("y", FLOAT, ["N", 4, 6, 6])], tensors)


class Retreat:
    """The real build, counted, and refused where nodes that it should resist are in the precision."""

    def __init__(self, proto, folder, precision, resists=(), names=True):
        source, recipe = read(proto, folder), Recipe.of(precision=precision)
        profiles = resolve_profiles(source, recipe)
        self.plan = folder / "engine.plan"
        self.builds = 0

        def build(typed):
            self.builds += 1
            bad = sorted(typed.changed & set(resists))
            if bad:
                raise BuildError(f"no kernel for {bad[0]}" if names else "no kernel", log=[])
            interface = Interface(typed.inputs, typed.outputs)
            return build_engine(typed.path, self.plan, recipe, profiles.profiles, interface=interface)

        maker = maker_for(
            source,
            recipe,
            profiles,
            folder,
            samples=choose_samples(None, source, profiles),
            tolerance=None,
            weight_only={},
        )
        self.typed, self.built = build_with_retreat(maker, build, self.plan)
        self.kept = {node.name for node in self.typed.report.kept}
        self.convolutions = {name for name in self.kept if "conv" in name}  # a Relu beside one may stay with it

    def check_files(self):
        """They are those of the engine that was chosen, whatever was tried after it."""
        assert sha256_of(self.plan) == self.built.engine.sha256
        assert {name: sha256_of(self.typed.path.parent / name) for name in self.typed.files} == self.typed.files


def test_all_nodes_of_an_operator_without_a_kernel_stay_at_the_first_failure(tmp_path):
    """TensorRT-RTX has no ConvTranspose in bfloat16, and names one of them in each build that fails."""
    found = Retreat(chain("ConvTranspose", "Conv", "ConvTranspose", "Conv", "ConvTranspose"), tmp_path, "bf16")
    assert found.builds == 2
    assert found.convolutions == {"convtranspose_0x", "convtranspose_2x", "convtranspose_4x"}
    found.check_files()


@pytest.mark.parametrize(
    ("resists", "builds", "kept"),
    [
        # One of them: the others return, with one build more.
        (["conv_1x"], 3, {"conv_1x"}),
        # Two of them, but each build names one: the others are given up rather than looked for.
        (["conv_1x", "conv_2x"], 3, {"conv_0x", "conv_1x", "conv_2x"}),
        # None of them resists.
        ([], 1, set()),
    ],
)
def test_costly_operators_are_not_given_up_for_one_of_their_nodes(resists, builds, kept, tmp_path):
    found = Retreat(chain("Conv", "Conv", "Conv"), tmp_path, "fp16", resists)
    assert (found.builds, found.convolutions) == (builds, kept)
    found.check_files()


def test_the_last_engine_that_was_built_is_not_built_again(tmp_path):
    """Where no node is named: with none of the changed nodes, then with each operator back, which is two of them."""
    found = Retreat(chain("Conv", "Conv"), tmp_path, "fp16", ["relu_0x"], names=False)
    assert found.builds == 4
    assert found.kept >= {"relu_0x", "relu_1x"}
    assert {"conv_0x", "conv_1x"} <= found.typed.changed
    found.check_files()


def test_a_model_that_cannot_be_built_at_all_raises_its_error(tmp_path):
    source, recipe = read(chain("Conv"), tmp_path), Recipe.of(precision="fp16")
    profiles = resolve_profiles(source, recipe)
    maker = maker_for(
        source,
        recipe,
        profiles,
        tmp_path,
        samples=choose_samples(None, source, profiles),
        tolerance=None,
        weight_only={},
    )

    def build(typed):
        raise BuildError(f"{len(typed.changed)} nodes are not the cause", log=[])

    with pytest.raises(BuildError, match="0 nodes are not the cause"):
        build_with_retreat(maker, build, tmp_path / "engine.plan")
