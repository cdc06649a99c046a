"""What the terminal shows: options and not keywords, 80 columns, the verdict first, exit codes that tell something."""

from __future__ import annotations

import re

import networks
import numpy as np
import pytest
import typer
from command_line import run

import mlflow_trt
from mlflow_trt import errors
from mlflow_trt.cli.options import parse_batch, parse_batches
from mlflow_trt.cli.trtexec import translate
from mlflow_trt.cli.wording import in_own_words
from mlflow_trt.convert.recipe import Recipe

KEYWORD = re.compile(r"(?<![\w'{\"-])[a-z_]+=")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("give it with shapes= instead", "give it with --min-shapes, --opt-shapes and --max-shapes instead"),
        ("or with batch=(min, opt, max), which", "or with --batch min:opt:max, which"),
        ("batch is (8, 4, 1); expected 1 <= min", "--batch is 8:4:1; expected 1 <= min"),
        ("leave targets= out", "leave --target out"),
        ("targets: sm99 is unknown", "--target: sm99 is unknown"),
        ("Pass calibration_data= or input_example= with real inputs", "Pass --calibration-data with real inputs"),
        ("pass calibration_data with at least 8 rows", "pass --calibration-data with at least 8 rows"),
        ("keep_float32 names 'Foo', which is", "--keep-float32 names 'Foo', which is"),
        ("Pass calibration_data= with rows, or verify=False.", "Pass --calibration-data with rows, or --no-verify."),
        ("choose precision='fp32'", "choose --precision fp32"),
        ("by the same recipe; force makes another version", "by the same recipe; --force makes another version"),
        ("Use runtime='onnxruntime' to run", """Use --model-config '{"runtime": "onnxruntime"}' to run"""),
        ("shapes['x'] has 3 dimensions", "the shapes of 'x' has 3 dimensions"),
        ("port is 99999; expected 0 to 65535", "--port is 99999; expected 0 to 65535"),
        ("queue_delay is -1; expected 0 or more", "--queue-delay is -1; expected 0 or more"),
    ],
)  # fmt: skip
def test_keywords_become_options(text, expected):
    assert in_own_words(text) == expected


@pytest.mark.parametrize(
    "text",
    ["models:/a/1 is the name= of nothing we know", "the tensor 'batch=3' is missing", "`--batch=3` is there", "x = 5",
     "MLFLOW_PYFUNC_INFERENCE_CONFIG='{\"runtime\": \"auto\"}'"],
)  # fmt: skip
def test_other_words_stay(text):
    assert in_own_words(text).replace("--name", "name=") == text


@pytest.mark.parametrize(
    "keywords",
    [
        {"precision": "fp64"},
        {"precision": "tf32", "allow_tf32": False},
        {"batch": (8, 4, 1)},
        {"batch": 0},
        {"shapes": {"x": 5}},
        {"shapes": {"x": ((1,), (1, 2), (1,))}},
        {"targets": "hopper"},
        {"keep_float32": 5},
        {"tactic_sources": ["CUDNN"]},
        {"memory_pools": {"dla": 5}},
        {"workspace_bytes": 0},
        {"optimization_level": 9},
        {"avg_timing_iterations": 0},
        {"builder_cache": False, "timing_cache": "x"},
        {"weight_streaming": True, "weights": "stripped"},
        {"calibration_method": "guess"},
    ],
    ids=str,
)
def test_no_error_of_a_recipe_names_a_keyword(keywords):
    with pytest.raises(errors.RecipeError) as caught:
        Recipe(**keywords)
    assert not KEYWORD.findall(in_own_words(caught.value.message))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "8:4:1"], "--batch is 8:4:1"),
        (["--target", "hopper"], "--target: "),
        (["--int8"], "pass --calibration-data with at least 8 rows"),
        (["--fp16", "--keep-float32", "Nothing"], "--keep-float32 names 'Nothing'"),
    ],
    ids=str,
)
def test_errors_name_options(arguments, words, tmp_path):
    (tmp_path / "m.onnx").write_bytes(networks.product().SerializeToString())
    code, _, printed = run("convert", tmp_path / "m.onnx", "--output", tmp_path / "m", *arguments, **NO_GPU)
    assert code == 1
    assert words in printed
    assert not KEYWORD.findall(printed.partition("Error: ")[2])


@pytest.mark.parametrize(
    ("text", "batch", "batches"),
    [("64", (64, 64, 64), [64]), ("1:8:64", (1, 8, 64), [1, 8, 64]), ("1,8,64", (1, 8, 64), [1, 8, 64])],
)
def test_batches_are_written_alike_wherever_they_are_given(text, batch, batches):
    assert parse_batch(text) == batch
    assert parse_batches(text) == batches


@pytest.mark.parametrize("text", ["", "1:2", "a", "1:8,64", "1;8"])
def test_other_batches_are_refused(text):
    with pytest.raises(typer.BadParameter, match="--batch"):
        parse_batch(text)
    if text != "1:2":
        with pytest.raises(typer.BadParameter, match="--batch"):
            parse_batches(text)


@pytest.mark.parametrize(
    ("line", "meant"),
    [("trtexec --onnx=m.onnx --fp61", "--fp16"), ("trtexec --onx=m.onnx", "--onnx"),
     ("trtexec --onnx=m.onnx --minShape=x:1x2", "--minShapes"), ("--onnx=m --memPoolSizes=x:1", "--memPoolSize")],
)  # fmt: skip
def test_a_misspelt_option_of_trtexec_is_told_the_right_one(line, meant):
    with pytest.raises(typer.BadParameter, match=re.escape(f"did you mean {meant}?")):
        translate(line)


def test_a_model_is_shown_in_80_columns_with_its_verdict_first(tmp_path):
    data = networks.rows(32)
    mlflow_trt.save_model(
        networks.product(), tmp_path / "half", precision="fp16", batch=(1, 4, 8), calibration_data=data
    )
    code, output, printed = run("inspect", "half", cwd=tmp_path, COLUMNS="80")
    assert code == 0, printed
    first, second, *others = output.splitlines()
    assert first == "half"
    assert second.startswith("passed, relative error ")
    assert max(map(len, others)) <= 80
    assert not re.search("[0-9a-f]{13}", output)
    code, output, _ = run("inspect", "half", "--json", cwd=tmp_path)
    assert re.search("[0-9a-f]{64}", output)


def test_fp32_without_a_gpu_says_what_was_not_measured(tmp_path):
    (tmp_path / "m.onnx").write_bytes(networks.product().SerializeToString())
    code, output, printed = run("convert", "m.onnx", "--output", "m", cwd=tmp_path, **NO_GPU, COLUMNS="80")
    assert code == 0, printed
    assert output.splitlines()[1] == "accuracy not measured"
    assert "the accuracy was not measured: the engine cannot run here" in " ".join(output.split())


def test_noise_is_warned_of(tmp_path, messages):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="fp16", batch=(1, 4, 8))
    assert [record.levelname for record in messages.records if "no evidence" in record.getMessage()] == ["WARNING"]


def test_a_filter_that_finds_nothing_has_an_exit_code_of_its_own(store):
    code, output, _ = run("convert", "--all", "name = 'nothing'", MLFLOW_TRACKING_URI=store.uri)
    assert (code, output.strip()) == (3, "no model matches")


def test_flags_have_no_type_in_the_help():
    code, output, _ = run("convert", "--help", COLUMNS="80")
    assert code == 0
    assert "<bool>" not in output
    assert "--no-fp16" in output


def test_no_fp16_takes_back_what_a_line_of_trtexec_says(tmp_path):
    (tmp_path / "m.onnx").write_bytes(networks.product().SerializeToString())
    line = f"trtexec --onnx={tmp_path / 'm.onnx'} --fp16"
    arguments = ["--from-trtexec", line, "--output", tmp_path / "m", "--dry-run", "--batch", "4"]
    for more, precision in (([], "fp16"), (["--no-fp16"], "fp32")):
        code, output, printed = run("convert", *arguments, *more)
        assert code == 0, printed
        assert re.search(rf"precision +{precision}", output)


def test_measurements_fit_80_columns(tmp_path):
    mlflow_trt.save_model(networks.product(), tmp_path / "m", precision="fp16", batch=(1, 4, 8))
    np.savez(tmp_path / "x.npz", networks.rows(8))
    code, output, printed = run("verify", "m", "--data", "x.npz", cwd=tmp_path, COLUMNS="80", **NO_GPU)
    assert code == 0, printed
    assert output.startswith("passed")
    code, benchmark, printed = run("benchmark", "m", "--batch", "1:4", "--seconds", "0.05", cwd=tmp_path, COLUMNS="80",
                                   **NO_GPU)  # fmt: skip
    assert code == 0, printed
    table = [line for line in (output + benchmark).splitlines() if not line.startswith(("not measured", "passed"))]
    assert max(map(len, table)) <= 80
