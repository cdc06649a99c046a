"""Ranges that were calibrated once, saved and used again."""

from __future__ import annotations

import json

import networks
import numpy as np
import onnx
import pytest
from command_line import run

import mlflow_trt
from mlflow_trt import OptionError, RecipeError
from mlflow_trt.flavor.fetch import read_record

DATA = networks.rows(64)


def typed_scales(folder):
    """The scales that int8 came to, by name."""
    model = onnx.load(folder / read_record(str(folder)).typed.file)
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor).tolist()
        for tensor in model.graph.initializer
        if "scale" in tensor.name
    }


def convert(folder, cache, **keywords):
    arguments = {"precision": "int8", "batch": (1, 4, 8), "calibration_cache": cache, **keywords}
    mlflow_trt.save_model(networks.product(), folder, **arguments)


@pytest.fixture
def filled(tmp_path):
    convert(tmp_path / "first", tmp_path / "ranges.json", calibration_data=DATA)
    return tmp_path / "ranges.json"


def test_the_same_comes_out_without_the_data(filled, tmp_path):
    saved = json.loads(filled.read_text())
    assert saved["samples"] == "64 rows of calibration data"
    assert saved["largest"]["x"] == pytest.approx(float(np.abs(DATA).max()))
    before = filled.read_bytes()
    convert(tmp_path / "again", filled)
    assert typed_scales(tmp_path / "first")
    assert typed_scales(tmp_path / "again") == typed_scales(tmp_path / "first")
    report = read_record(str(tmp_path / "again")).precision_report
    assert report.calibration.samples == "64 rows of calibration data"
    assert filled.read_bytes() == before


def test_other_data_is_measured_and_replaces_what_was_saved(filled, tmp_path):
    convert(tmp_path / "louder", filled, calibration_data=3 * DATA)
    assert json.loads(filled.read_text())["largest"]["x"] == pytest.approx(3 * float(np.abs(DATA).max()))
    assert typed_scales(tmp_path / "louder") != typed_scales(tmp_path / "first")


def test_each_method_is_kept_beside_the_others(filled, tmp_path):
    recipe = mlflow_trt.Recipe(precision="int8", calibration_method="percentile", batch=(1, 4, 8))
    with pytest.raises(RecipeError, match="no ranges by the method percentile; give calibration_data"):
        convert(tmp_path / "none", filled, recipe=recipe, precision=None, batch=None)
    convert(tmp_path / "two", filled, recipe=recipe, precision=None, batch=None, calibration_data=DATA)
    assert json.loads(filled.read_text())["cutoffs"]["percentile"]
    convert(tmp_path / "again", filled, recipe=recipe, precision=None, batch=None)
    assert typed_scales(tmp_path / "again") == typed_scales(tmp_path / "two")


@pytest.mark.parametrize("text", ["TRT-100100-EntropyCalibration2\nx: 3c010a14", "{}"], ids=["of TensorRT", "empty"])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "ranges").write_text(text)
    with pytest.raises(RecipeError, match="it holds something else"):
        convert(tmp_path / "m", tmp_path / "ranges", calibration_data=DATA)
    assert (tmp_path / "ranges").read_text() == text


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"source_sha256": "0" * 64}, "has the ranges of another model"), ({"format": 2}, "in format 2")],
    ids=["another model", "newer"],
)
def test_ranges_that_are_not_this_models_are_refused(changed, words, filled, tmp_path):
    text = json.dumps({**json.loads(filled.read_text()), **changed})
    filled.write_text(text)
    with pytest.raises(RecipeError, match=words):
        convert(tmp_path / "m", filled, calibration_data=DATA)
    assert filled.read_text() == text


def test_other_precisions_have_no_ranges_to_save(tmp_path):
    with pytest.raises(OptionError, match="for int8, fp8 and best, and the precision is fp16"):
        convert(tmp_path / "m", tmp_path / "ranges.json", precision="fp16", calibration_data=DATA)


def test_the_command(filled, tmp_path):
    (tmp_path / "m.onnx").write_bytes(networks.product().SerializeToString())
    arguments = ["--int8", "--batch", "1:4:8", "--calibration-cache", filled, "--output", tmp_path / "m", "--json"]
    code, output, errors = run("convert", tmp_path / "m.onnx", *arguments, CUDA_VISIBLE_DEVICES="")
    assert code == 0, errors
    assert json.loads(output)["precision_report"]["calibration"]["samples"] == "64 rows of calibration data"
    code, _, errors = run("convert", tmp_path / "m.onnx", "--calibration-cache", filled, "--output", tmp_path / "n")
    assert code == 1
    assert "--calibration-cache is for int8, fp8 and best" in errors
