"""The shapes of TensorRT's network against those of the reference: what needs no GPU to be found wrong."""

from __future__ import annotations

import mlflow
import networks
import numpy as np
import pytest
from helpers import prepare, save_prepared
from registries import registry_state
from stopwatch import Stopwatch

import mlflow_trt
from mlflow_trt import BuildError, UnsupportedModelError
from mlflow_trt.convert.conversion import convert_source
from mlflow_trt.convert.engine.output_shapes import check_output_shapes
from mlflow_trt.core.selection import Fate
from mlflow_trt.core.types import BatchAxis, Distribution, EngineRecord
from mlflow_trt.pipeline import verify
from mlflow_trt.registry.add_engine import add_engine
from mlflow_trt.store.folder import read_folder

ENGINE = EngineRecord(file="e", sha256="", size=1, distribution=Distribution.TENSORRT_RTX, version="1.7.1.116")
ROWS = BatchAxis(inputs=("x",), splits=True, declared=True)
IMAGES = {"x": np.random.default_rng(0).standard_normal((8, 3, 2, 2)).astype(np.float32)}


def check(network, *samples, axis=None):
    arrays = [
        ({"x": np.zeros(x)}, {name: np.zeros(shape) for name, shape in outputs.items()}) for x, outputs in samples
    ]
    check_output_shapes(ENGINE, network, arrays, axis)


@pytest.mark.parametrize(
    ("network", "shape", "said"),
    [
        ((-1, 2), (4, 3), r"\(any, 2\) in TensorRT's network, and \(4, 3\) where ONNX Runtime"),
        ((-1, 2), (4, 2, 1), r"\(any, 2\) in TensorRT's network, and \(4, 2, 1\)"),
        ((-1,), (), r"\(any\) in TensorRT's network, and \(\) where"),
        ((), (1,), r"\(\) in TensorRT's network, and \(1\) where"),
        ((0, 2), (4, 2), r"\(0, 2\) in TensorRT's network"),
    ],
)
def test_other_ranks_and_sizes_are_refused(network, shape, said):
    with pytest.raises(UnsupportedModelError, match=rf"1\.7\.1\.116 .* output 'y' has the shape {said}") as caught:
        check({"x": (-1, 5), "y": network}, ((4, 5), {"y": shape}))
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("network", "shape"),
    [((-1, 2), (4, 2)), ((-1, -1), (7, 0)), ((), ()), ((0, 2), (0, 2)), ((4, 2), (4, 2))],
)
def test_what_varies_may_have_any_size(network, shape):
    check({"x": (-1, 5), "y": network}, ((4, 5), {"y": shape}), axis=ROWS)


def test_each_sample_counts():
    with pytest.raises(UnsupportedModelError, match=r"\(1, 3\) in TensorRT's network, and \(2, 3\)"):
        check({"x": (-1, 5), "y": (1, 3)}, ((1, 5), {"y": (1, 3)}), ((2, 5), {"y": (2, 3)}))


def test_samples_that_the_engine_does_not_take_prove_nothing():
    check({"x": (4, 5), "y": (4, 6)}, ((4, 9), {"y": (4, 10)}))


@pytest.mark.parametrize("rows", [3, 8])
def test_rows_are_filled_up_to_a_fixed_batch_or_cut_to_it(rows):
    check({"x": (4, 5), "y": (4, 6)}, ((rows, 5), {"y": (rows, 6)}), axis=ROWS)
    for wrong in ((4, 7), (1, 6)):
        with pytest.raises(UnsupportedModelError, match=r"and \(4, 6\) where ONNX Runtime"):
            check({"x": (4, 5), "y": wrong}, ((rows, 5), {"y": (rows, 6)}), axis=ROWS)


@pytest.mark.parametrize("recipe", [{}, {"batch": 4}, {"batch": (1, 4, 8), "precision": "tf32"}], ids=str)
def test_an_engine_of_other_shapes_is_not_logged(recipe, store):
    with pytest.raises(UnsupportedModelError, match=r"output 'y' .*, 3, 2, 2\) in .*, 3, 1, 1\) where ONNX Runtime"):
        mlflow_trt.log_model(networks.pooled(), name="m", registered_model_name="m", calibration_data=IMAGES, **recipe)
    assert store.is_untouched()


def test_a_window_that_lies_inside_is_right(tmp_path):
    mlflow_trt.save_model(networks.pooled(height=3), tmp_path / "m")


def test_what_the_model_declares_is_not_looked_at(tmp_path):
    model = networks.product()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9
    mlflow_trt.save_model(model, tmp_path / "m")


@pytest.mark.parametrize("model", [networks.scaled_by_a_scalar(), networks.shape_output(), networks.every_dtype()])
def test_scalars_and_shapes_and_all_types_pass(model, tmp_path):
    shapes = {"x": ((1, 16), (4, 16), (8, 16))} if model.graph.input[0].name == "x" else None
    mlflow_trt.save_model(model, tmp_path / "m", shapes=shapes)


def test_without_a_reference_nothing_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_trt.backends.onnxruntime.is_installed", lambda name: False)
    mlflow_trt.save_model(networks.pooled(), tmp_path / "m")
    assert "not verified" in " ".join(read_folder(tmp_path / "m").record.remarks)


def test_of_the_candidates_for_best_it_is_the_one_to_lose(tmp_path, monkeypatch):
    def only_bf16(engine, network, samples, axis):
        if engine.sha256 == refused[-1]:
            check_output_shapes(engine, network | {"y": (-1, 9)}, samples, axis)

    refused = []

    def noting(task):
        conversion = convert_source(task)
        refused.append(conversion.engine.sha256 if str(task.recipe.precision) == "bf16" else None)
        return conversion

    monkeypatch.setattr("mlflow_trt.pipeline.best.convert_source", noting)
    monkeypatch.setattr(verify, "check_output_shapes", only_bf16)
    prepared = prepare(precision="best", calibration_data={"x": networks.rows(32)}, bench=Stopwatch(bf16=0.1))
    save_prepared(networks.product(), tmp_path / "m", prepared)
    candidates = {str(c.precision): c for c in read_folder(tmp_path / "m").record.selection.candidates}
    assert candidates["int8"].fate is Fate.WON
    assert candidates["bf16"].fate is Fate.FAILED_GATE
    assert "output 'y' has the shape (any, 9)" in candidates["bf16"].reason


def test_where_all_candidates_for_best_lose_the_error_says_why(tmp_path):
    prepared = prepare(precision="best", calibration_data=IMAGES, bench=Stopwatch())
    with pytest.raises(BuildError, match="found no engine that passes. fp32: failed the gate"):
        save_prepared(networks.pooled(), tmp_path / "m", prepared)


def test_an_engine_that_is_added_is_checked_with_the_golden_sample(store, monkeypatch):
    mlflow.onnx.log_model(networks.pooled(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    with monkeypatch.context() as patched:
        patched.setattr(verify, "check_output_shapes", lambda *arguments: None)
        mlflow_trt.convert_model_version("models:/p/1", "p-trt", targets="sm86", calibration_data=IMAGES)
    before = registry_state(store.client)
    with pytest.raises(UnsupportedModelError, match="output 'y' has the shape"):
        add_engine("models:/p-trt/1", targets="sm120")
    assert registry_state(store.client) == before
