"""Whether rows depend on each other is measured, whatever the model calls their axis."""

from __future__ import annotations

import mlflow
import networks
import numpy as np
import onnx
import pytest
from helpers import read
from networks import FLOAT, INT64, constant, value
from onnx import helper

import mlflow_trt
from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.cli.render import print_record
from mlflow_trt.convert.conversion import choose_samples
from mlflow_trt.convert.recipe import Recipe
from mlflow_trt.convert.resolve_profiles import Profiles, resolve_profiles
from mlflow_trt.convert.row_dependence import check_rows
from mlflow_trt.convert.samples import SampleData, SampleOrigin
from mlflow_trt.errors import InputShapeError, UnsupportedModelError
from mlflow_trt.runtime.batching.choose_profile import choose_profile
from mlflow_trt.store.folder import read_folder

node = helper.make_node
WEIGHTS = np.random.default_rng(5).standard_normal((16, 16)).astype(np.float32) / 4


def rows_model(*nodes, initializers=(), name="N", outputs=None, inputs=()):
    return networks.model(
        nodes,
        [value("x", FLOAT, [name, 16]), *inputs],
        outputs or [value("y", FLOAT, [name, 16])],
        [constant("w", WEIGHTS), constant("zero", np.array([0])), constant("one", np.array([1])), *initializers],
    )


def point_cloud(name="N"):
    """Points are placed relative to the largest of all."""
    return rows_model(
        node("MatMul", ["x", "w"], ["h"]),
        node("ReduceMax", ["h"], ["largest"], axes=[0], keepdims=1),
        node("Sub", ["h", "largest"], ["y"]),
        name=name,
    )


def measured(model, tmp_path, data=None, **recipe) -> Profiles:
    source = read(model, tmp_path)
    profiles = resolve_profiles(source, Recipe.of(**recipe))
    given = None if data is None else SampleData(arrays=data, origin=SampleOrigin.CALIBRATION_DATA)
    return check_rows(source, profiles, choose_samples(given, source, profiles))


def dilated(distance: int) -> onnx.ModelProto:
    """A convolution over time, which is what the axis counts: two steps next to each other do not see each other."""
    kernel = np.random.default_rng(0).standard_normal((16, 16, 3)).astype(np.float32)
    return rows_model(
        node("Transpose", ["x"], ["columns"], perm=[1, 0]),
        node("Unsqueeze", ["columns", "first"], ["series"]),
        node("Conv", ["series", "kernel"], ["mixed"], dilations=[distance], pads=[distance, distance]),
        node("Squeeze", ["mixed", "first"], ["rows"]),
        node("Transpose", ["rows"], ["y"], perm=[1, 0]),
        initializers=[constant("first", np.array([0])), constant("kernel", kernel)],
    )


DEPENDENT = {
    "a cloud of points": point_cloud(),
    "a softmax over rows": rows_model(node("Softmax", ["x"], ["y"], axis=0)),
    "a sum of the rows so far": rows_model(
        node("CumSum", ["x", "axis"], ["y"]), initializers=[constant("axis", np.int64(0))]
    ),
    "a batch normalization that trains": rows_model(
        node("BatchNormalization", ["x", *"sbmv"], ["y", "mean", "variance"], training_mode=1),
        initializers=[constant(name, np.ones(16, np.float32)) for name in "sbmv"],
    ),
    "a step four rows away": dilated(4),
    "a step eight rows away": dilated(8),
    # Five rows have to be there: two do not run at all, and none runs alone.
    "the largest of the rows": rows_model(
        node("TopK", ["x", "k"], ["largest", "where"], axis=0),
        node("ReduceMin", ["largest"], ["fifth"], axes=[0]),
        node("Sub", ["x", "fifth"], ["y"]),
        initializers=[constant("k", np.array([5]))],
    ),
    "decibels below the loudest": rows_model(
        node("MatMul", ["x", "w"], ["h"]),
        node("Mul", ["h", "h"], ["power"]),
        node("Log", ["power"], ["log"]),
        node("ReduceMax", ["log"], ["loudest"], keepdims=1),
        node("Sub", ["loudest", "range"], ["floor"]),
        node("Max", ["log", "floor"], ["y"]),
        initializers=[constant("range", np.float32(2))],
        name="batch_size",
    ),
    "a cell that goes from row to row": networks.model(
        [
            node("GRU", ["x", "w", "r"], ["all", "last"], hidden_size=4),
            node("Squeeze", ["all", "one"], ["y"]),
        ],
        [value("x", FLOAT, ["batch", 1, 16])],
        [value("y", FLOAT, ["batch", 1, 4])],
        [
            constant("w", np.resize(WEIGHTS, (1, 12, 16))),
            constant("r", np.resize(WEIGHTS, (1, 12, 4))),
            constant("one", np.array([1])),
        ],
    ),
    "the row before": rows_model(
        node("Pad", ["x", "pads"], ["padded"]),
        node("Slice", ["padded", "zero", "end", "zero"], ["y"]),
        initializers=[constant("pads", np.array([1, 0, 0, 0])), constant("end", np.array([-1]))],
    ),
    "rows that are left out": rows_model(
        node("ReduceSum", ["x", "one"], ["sum"], keepdims=0),
        node("Greater", ["sum", "threshold"], ["passes"]),
        node("Compress", ["x", "passes"], ["y"], axis=0),
        outputs=[value("y", FLOAT, ["found", 16])],
        initializers=[constant("threshold", np.float32(0))],
    ),
    "a share of how many there are": rows_model(
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "first"], ["count"]),
        node("Cast", ["count"], ["rows"], to=FLOAT),
        node("Div", ["x", "rows"], ["y"]),
        initializers=[constant("first", np.int64(0))],
    ),
    "one output of two": rows_model(
        node("MatMul", ["x", "w"], ["y"]),
        node("Softmax", ["x"], ["z"], axis=0),
        outputs=[value("y", FLOAT, ["N", 16]), value("z", FLOAT, ["N", 16])],
    ),
    "a second input by its largest value": rows_model(
        node("ReduceMax", ["lengths"], ["longest"], keepdims=1),
        node("Div", ["lengths", "longest"], ["share"]),
        node("Unsqueeze", ["share", "one"], ["column"]),
        node("Mul", ["x", "column"], ["y"]),
        inputs=[value("lengths", FLOAT, ["N"])],
    ),
    "integers by their sum": networks.model(
        [node("ReduceSum", ["x"], ["sum"], keepdims=1), node("Add", ["x", "sum"], ["y"])],
        [value("x", INT64, ["N"])],
        [value("y", INT64, ["N"])],
    ),
}

INDEPENDENT = {
    "a product": networks.product(),
    "the best class": rows_model(
        node("MatMul", ["x", "w"], ["h"]),
        node("ArgMax", ["h"], ["y"], axis=1, keepdims=0),
        outputs=[value("y", INT64, ["N"])],
    ),
    "rounded values": rows_model(node("MatMul", ["x", "w"], ["h"]), node("Round", ["h"], ["y"])),
    # Rounding is amplified by a factor of ten thousand.
    "a sine of large values": rows_model(
        node("MatMul", ["x", "w"], ["h"]),
        node("Mul", ["h", "large"], ["angle"]),
        node("Sin", ["angle"], ["y"]),
        initializers=[constant("large", np.float32(1e4))],
    ),
    "values that are not finite": rows_model(node("Log", ["x"], ["y"])),
    "outputs that are zero": rows_model(node("Sub", ["x", "x"], ["y"])),
    "an input that all rows share": rows_model(
        node("MatMul", ["x", "shared"], ["y"]), inputs=[value("shared", FLOAT, [16, 16])]
    ),
    "a cell along another axis": networks.transformer(),
    "three inputs of other ranks": networks.ranks(),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_rows_that_depend_on_each_other_are_found(kind, tmp_path):
    profiles = measured(DEPENDENT[kind], tmp_path)
    axis = profiles.batch_axis
    assert axis is not None
    assert axis.dependence is not None
    assert not axis.splits
    assert str(axis.dependence) in profiles.remarks[-1]
    assert "neither split nor padded" in profiles.remarks[-1]


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_rounding_is_no_dependence(kind, tmp_path):
    shapes = {"input_ids": ((-1, 8),) * 3} if "another axis" in kind else None
    profiles = measured(INDEPENDENT[kind], tmp_path, shapes=shapes)
    axis = profiles.batch_axis
    assert axis is not None
    assert axis.splits
    assert axis.dependence is None


def test_what_was_measured_is_the_error_of_rows_that_run_apart(tmp_path):
    """The number is that of ONNX Runtime on these very rows."""
    rows = networks.rows(2)
    model = point_cloud()
    axis = measured(model, tmp_path, {"x": rows}).batch_axis
    runner = CpuModel(read(model, tmp_path).path)
    together = runner.run(["y"], {"x": rows})["y"]
    worst = 0.0
    for row in (0, 1):
        for other in (rows[row : row + 1], np.repeat(rows[row : row + 1], 2, axis=0)):
            alone = runner.run(["y"], {"x": other})["y"][-1]
            worst = max(worst, float(np.linalg.norm(alone - together[row]) / np.linalg.norm(together[row])))
    assert axis is not None
    assert axis.dependence is not None
    assert axis.dependence.output == "y"
    assert axis.dependence.relative_error == pytest.approx(worst, rel=1e-4)


@pytest.mark.parametrize("data", [networks.rows(1), np.repeat(networks.rows(1), 5, axis=0)], ids=["one", "the same"])
def test_a_single_row_is_enough_to_see_it(data, tmp_path):
    axis = measured(point_cloud(), tmp_path, {"x": data}).batch_axis
    assert axis is not None
    assert axis.dependence is not None


def test_a_declared_batch_is_split_all_the_same_with_a_warning(tmp_path, messages):
    profiles = measured(point_cloud(), tmp_path, batch=(1, 4, 8))
    axis = profiles.batch_axis
    assert axis is not None
    assert axis.splits
    assert axis.dependence is not None
    assert f"batch= says that rows do not depend on each other, but they do: {axis.dependence}" in messages.text
    assert "give the range of this axis with shapes=" in profiles.remarks[-1]


def test_random_numbers_are_no_dependence(tmp_path):
    model = rows_model(node("RandomNormalLike", ["x"], ["noise"]), node("Add", ["x", "noise"], ["y"]))
    profiles = measured(model, tmp_path)
    assert profiles.batch_axis is not None
    assert profiles.batch_axis.dependence is None
    assert "answers the same inputs differently each time" in profiles.remarks[-1]


def test_a_model_that_onnx_runtime_cannot_run_is_not_measured(tmp_path):
    model = rows_model(node("Mystery", ["x"], ["y"], domain="nobody"))
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    profiles = measured(model, tmp_path)
    assert profiles.batch_axis is not None
    assert profiles.batch_axis.splits
    assert "whether rows depend on each other was not measured: ONNX Runtime" in profiles.remarks[-1]


def test_a_saved_model_answers_for_all_rows_together(tmp_path, capsys):
    """More rows than the range has are no pieces; the record and `inspect` say why, and so does a GPU's error."""
    model = point_cloud()
    mlflow_trt.save_model(model, tmp_path / "saved")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "saved"), model_config={"runtime": "onnxruntime"})
    expected = CpuModel(read(model, tmp_path).path)
    for count in (1, 9, 40):
        rows = networks.rows(count)
        np.testing.assert_allclose(
            loaded.predict({"x": rows})["y"], expected.run(["y"], {"x": rows})["y"], rtol=1e-5, atol=1e-5
        )
    record = read_folder(tmp_path / "saved").record
    assert record.batch_axis is not None
    assert not record.batch_axis.splits
    print_record("saved", record)
    shown = " ".join(capsys.readouterr().out.split())
    assert "neither split nor padded; rows depend on each other" in shown
    assert record.batch_axis.dependence is not None
    with pytest.raises(InputShapeError, match=r"Batches are not split, since rows depend on each other: .*output 'y'"):
        choose_profile(record.profiles, {"x": networks.rows(40)}, record.batch_axis)


def one_row_inside() -> onnx.ModelProto:
    """Exported with an example of one row, which a Reshape has kept."""
    return networks.model(
        [node("Reshape", ["x", "shape"], ["flat"], name="flatten"), node("MatMul", ["flat", "w"], ["y"])],
        [value("x", FLOAT, ["N", 4, 4])],
        [value("y", FLOAT, ["N", 16])],
        [constant("shape", np.array([1, 16])), constant("w", WEIGHTS)],
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_batch_axis_that_varies_by_name_alone_is_told(precision, tmp_path):
    """TensorRT said that a kOPT value violates a constraint, and fp16 advised to take fp32."""
    with pytest.raises(UnsupportedModelError, match=r"axis 0 of x varies .* for 1 row and not for \d+: .* batch=1\."):
        mlflow_trt.save_model(one_row_inside(), tmp_path / "m", precision=precision, batch=(1, 4, 8))
    mlflow_trt.save_model(one_row_inside(), tmp_path / "m", precision=precision, batch=1)
    (ranges,) = [profile.ranges["x"] for profile in read_folder(tmp_path / "m").record.profiles]
    assert ranges.max == (1, 4, 4)
