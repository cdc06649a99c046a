from __future__ import annotations

import networks
import numpy as np
import pytest
from onnx import helper
from real_models import CLS, DET, MAGIKA, SILERO

import mlflow_trt
from mlflow_trt import Recipe, RecipeError
from mlflow_trt.convert.onnx.dimension_names import name_dimensions_apart
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.convert.resolve_profiles import resolve_profiles
from mlflow_trt.core.types import BatchAxis

FLOAT, INT64 = networks.FLOAT, networks.INT64


def resolve(model, folder, example=None, **recipe):
    return resolve_profiles(read_onnx(model, folder), Recipe(**recipe), example)


def ranges(profiles, number=0):
    return {name: str(limits) for name, limits in profiles.profiles[number].ranges.items()}


def two_inputs(first, second, outputs):
    return networks.model(
        [helper.make_node("Identity", ["a"], ["c"]), helper.make_node("Identity", ["b"], ["d"])],
        [networks.value("a", FLOAT, first), networks.value("b", FLOAT, second)],
        [networks.value("c", FLOAT, outputs[0]), networks.value("d", FLOAT, outputs[1])],
    )


def test_a_batch_left_out_is_filled_in_and_the_user_is_told(tmp_path):
    profiles = resolve(networks.product(), tmp_path)
    assert ranges(profiles) == {"x": "1x16:8x16:32x16"}
    assert profiles.batch_axis == BatchAxis(inputs=("x",), splits=True, declared=False)
    assert profiles.remarks == (
        "axis 0 of input 'x' is taken as the batch axis, for 1 to 32 rows, 8 usually; change that with shapes=, or "
        "with batch=(min, opt, max), which also says that the rows do not depend on each other",
    )


def test_a_static_batch(tmp_path):
    assert ranges(resolve(networks.product(), tmp_path, batch=64)) == {"x": "64x16:64x16:64x16"}


def test_a_model_of_fixed_shapes_has_no_profile(tmp_path):
    profiles = resolve(networks.product(batch=4), tmp_path)
    assert profiles.profiles == ()
    assert profiles.batch_axis is None


def test_axes_of_one_name_share_their_range(tmp_path):
    profiles = resolve(
        networks.transformer(), tmp_path, batch=(1, 2, 4), shapes={"input_ids": ((-1, 4), (-1, 16), (-1, 32))}
    )
    assert ranges(profiles) == {"input_ids": "1x4:2x16:4x32", "attention_mask": "1x4:2x16:4x32"}
    assert profiles.batch_axis == BatchAxis(inputs=("input_ids", "attention_mask"), splits=True, declared=True)


def test_several_profiles(tmp_path):
    small, large = ((1, 16), (1, 16), (1, 16)), ((2, 16), (32, 16), (64, 16))
    profiles = resolve(networks.product(), tmp_path, shapes=[{"x": small}, {"x": large}])
    assert [ranges(profiles, number)["x"] for number in (0, 1)] == ["1x16:1x16:1x16", "2x16:32x16:64x16"]


def test_an_input_example_fixes_what_nothing_else_says(tmp_path):
    profiles = resolve(DET.path(), tmp_path, batch=(1, 2, 4), example={"x": (3, 3, 64, 96)})
    assert ranges(profiles) == {"x": "1x3x64x96:2x3x64x96:4x3x64x96"}
    assert "axis 2 of input 'x' is fixed to 64, as in the input example; say otherwise with shapes=" in profiles.remarks


def test_values_of_a_shape_tensor(tmp_path):
    shapes = {"x": ((1, 16), (4, 16), (8, 16)), "shape": ((1, 1), (8, 8), (128, 128))}
    limits = resolve(networks.reshaped(), tmp_path, shapes=shapes).profiles[0].ranges["shape"]
    assert limits.is_values
    assert limits.contains((4, 16))
    assert not limits.contains((4, 129))


def test_output_names_need_not_repeat_the_batch_axis(tmp_path):
    assert resolve(DET.path(), tmp_path, **DET.recipe).batch_axis.splits
    assert resolve(CLS.path(), tmp_path, **CLS.recipe).batch_axis.splits
    assert resolve(MAGIKA.path(), tmp_path, **MAGIKA.recipe).batch_axis.splits


@pytest.mark.parametrize(
    ("first", "second", "outputs", "expected"),
    [
        # The state carries the batch on axis 1: it can be chosen, but not be cut along axis 0.
        (["batch", 4], [2, "batch"], (["batch", 4], [2, "batch"]),
         BatchAxis(inputs=("a",), splits=False, declared=True)),
        # One input is shared by all rows.
        (["batch", 4], [7, 4], (["batch", 4], ["other", 4]), BatchAxis(inputs=("a",), splits=True, declared=True)),
        # An output begins with another input's axis.
        (["batch", 4], [2, "time"], (["batch", 4], ["time", "batch"]),
         BatchAxis(inputs=("a",), splits=False, declared=True)),
        # Two inputs with rows.
        (["batch", 4], ["batch"], (["batch", 4], ["batch"]), BatchAxis(inputs=("a", "b"), splits=True, declared=True)),
    ],
)  # fmt: skip
def test_what_can_be_split(first, second, outputs, expected, tmp_path):
    shapes = {"b": ((2, 5), (2, 5), (2, 5))} if "time" in second else {}
    model = two_inputs(first, second, outputs)
    assert resolve(model, tmp_path, batch=(1, 2, 4), shapes=shapes).batch_axis == expected


def test_two_names_of_one_batch_are_one_where_the_user_says_so(tmp_path):
    model = two_inputs(["batch", 3], ["batch_1", 4], (["batch", 3], ["batch_1", 4]))
    profiles = resolve(model, tmp_path, batch=(1, 2, 4))
    assert ranges(profiles) == {"a": "1x3:2x3:4x3", "b": "1x4:2x4:4x4"}
    assert profiles.batch_axis == BatchAxis(inputs=("a", "b"), splits=True, declared=True)
    assert resolve(model, tmp_path, shapes=dict.fromkeys("ab", ((1, -1), (2, -1), (4, -1)))).batch_axis is None


def test_rows_of_a_batch_with_two_names_are_counted_together(tmp_path):
    model = two_inputs(["batch", 3], ["batch_1", 4], (["batch", 3], ["batch_1", 4]))
    mlflow_trt.save_model(model, tmp_path / "model", batch=(1, 2, 4))
    feeds = {"a": networks.rows(11, 3), "b": networks.rows(11, 4, seed=1)}
    with mlflow_trt.load_model(str(tmp_path / "model"), runtime="onnxruntime") as session:
        outputs = session.run(feeds)
        assert np.array_equal(outputs["c"], feeds["a"])
        assert np.array_equal(outputs["d"], feeds["b"])
        assert set(session.runs) == {4, 3}


@pytest.mark.parametrize("size", [2**31, 2**70])
def test_dimensions_that_nothing_counts_to_are_refused(size, tmp_path):
    with pytest.raises(RecipeError, match=r"dimensions of 2\*\*31 and more"):
        resolve(networks.product(), tmp_path, shapes={"x": ((1, 16), (1, 16), (size, 16))})


@pytest.mark.parametrize("name", ["batch", "N", "batch_size", "input_dynamic_batch"])
def test_an_axis_that_the_model_calls_a_batch_can_be_split(name, tmp_path):
    assert resolve(networks.product(batch=name), tmp_path).batch_axis.splits


@pytest.mark.parametrize("name", ["num_nodes", "unk__214", "DynamicDimension.0", "?", None])
def test_any_other_can_be_only_if_the_user_says_so(name, tmp_path):
    """Rows may depend on each other, like the nodes of a graph: in pieces, the mean over them would be another."""
    model = networks.product(batch=name)
    assert not resolve(model, tmp_path).batch_axis.splits
    assert resolve(model, tmp_path, batch=(1, 4, 8)).batch_axis.splits


@pytest.mark.parametrize("name", ["batch", None])
@pytest.mark.parametrize("output", [["batch", "batch"], [None, None], ["out_0", "out_1"]])
def test_a_matrix_of_all_rows_by_all_rows_cannot_be_split(name, output, tmp_path):
    model = networks.model(
        [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])],
        [networks.value("x", FLOAT, [name, 16])],
        [networks.value("y", FLOAT, output)],
    )
    assert not resolve(model, tmp_path, batch=(1, 4, 8)).batch_axis.splits


def test_a_batch_that_the_model_has_anyway(tmp_path):
    assert resolve(networks.product(batch=4), tmp_path, batch=4).profiles == ()


def test_a_sequence_is_no_batch_unless_declared(tmp_path):
    model = networks.product(batch="sequence_length")
    shapes = {"x": ((1, 16), (4, 16), (8, 16))}
    assert resolve(model, tmp_path, shapes=shapes).batch_axis is None
    with pytest.raises(RecipeError, match=r"no range is known for axis 0 \(sequence_length\)"):
        resolve(model, tmp_path)
    assert resolve(model, tmp_path, batch=(1, 4, 8)).batch_axis.splits


def test_a_fixed_shape_may_be_given_again(tmp_path):
    model = networks.model(
        [helper.make_node("Add", ["x", "k"], ["y"])],
        [networks.value("x", INT64, ["n", 1]), networks.value("k", INT64, [1])],
        [networks.value("y", INT64, ["n", 1])],
    )
    assert ranges(resolve(model, tmp_path, batch=2, shapes={"k": ((1,), (1,), (1,))})) == {"x": "2x1:2x1:2x1"}


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        (lambda: networks.product(batch=4), {"batch": 8}, "this model has no batch axis"),
        (SILERO.path, {"batch": 8}, r"this model has no batch axis.*hn: float32\[1, LSTMhn_dim_1, 128\]"),
        (networks.product, {"shapes": {"y": ((1, 16),) * 3}}, "shapes names 'y', but the inputs are x"),
        (networks.product, {"shapes": {"x": ((1, 3, 16),) * 3}}, "has 3 dimensions, but the input is x: float32"),
        (networks.product, {"shapes": {"x": ((1, 16), (2, 16), (4, 17))}}, r"max is \(4, 17\), but axis 1"),
        (networks.product, {"shapes": {"x": ((4, 16), (2, 16), (8, 16))}}, "expected min <= opt <= max"),
        (networks.product, {"shapes": {"x": ((1, 16), (-1, 16), (8, 16))}}, "mixes -1 and numbers at axis 0"),
        (networks.product, {"batch": 4, "shapes": {"x": ((1, 16),) * 3}}, "give one of them, or -1"),
        (DET.path, {"batch": (1, 2, 4)}, r"no range is known for axis 2 \(DynamicDimension.1\) of x"),
        (networks.reshaped, {"shapes": {"shape": ((8, 8), (1, 1), (9, 9))}}, "expected min <= opt <= max"),
    ],
)
def test_refuses_what_the_graph_contradicts(model, recipe, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        resolve(model(), tmp_path, **recipe)


class TestDimensionNames:
    def names(self, model):
        return [[dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in model.graph.input]

    def told_apart(self, model, folder, **recipe):
        source = read_onnx(model, folder)
        return source, name_dimensions_apart(source.proto, resolve_profiles(source, Recipe(**recipe)).profiles)

    def test_nothing_collides_nothing_changes(self, tmp_path):
        shapes = {"input_ids": ((-1, 4), (-1, 16), (-1, 32))}
        source, result = self.told_apart(networks.transformer(), tmp_path, batch=4, shapes=shapes)
        assert result is source.proto

    def test_names_without_meaning_are_told_apart(self, tmp_path):
        source, result = self.told_apart(CLS.path(), tmp_path, **CLS.recipe)
        assert self.names(result) == [["", "", "x_axis_2", "x_axis_3"]]
        assert self.names(source.proto) == [["", "", "?", "?"]]

    def test_a_name_with_two_ranges_is_two_names(self, tmp_path):
        model = two_inputs(["n", "n"], ["n", 4], (["n", "n"], ["n", 4]))
        shapes = {"a": ((1, 3), (2, 3), (4, 3)), "b": ((1, 4), (2, 4), (4, 4))}
        _, result = self.told_apart(model, tmp_path, shapes=shapes)
        assert self.names(result) == [["a_axis_0", "a_axis_1"], ["b_axis_0", ""]]
        assert not any(dim.dim_param for value in result.graph.output for dim in value.type.tensor_type.shape.dim)

    def test_equal_ranges_keep_their_name(self, tmp_path):
        model = two_inputs(["n", 4], ["n", 4], (["n", 4], ["n", 4]))
        source, result = self.told_apart(model, tmp_path, batch=4)
        assert result is source.proto
