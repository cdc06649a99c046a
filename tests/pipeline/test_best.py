"""`precision="best"`: real builds and real errors on ONNX Runtime; only the latencies, for want of a GPU, are given."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from compare import relative_error
from helpers import convert_in, log_prepared, prepare, save_prepared
from networks import quantized
from real_models import CLS, TRANSFORMER, calibration_data
from stopwatch import Stopwatch
from tiers import exhaustive
from typer.testing import CliRunner

import mlflow_trt
from mlflow_trt import (
    AccuracyError,
    BuildError,
    ExecutionError,
    MissingDependencyError,
    OutOfMemoryError,
    Precision,
    Recipe,
    RecipeError,
    RuntimeUnavailableError,
    Tolerance,
)
from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.backends.onnxruntime import CpuModel
from mlflow_trt.cli import app
from mlflow_trt.convert.onnx.model import read_onnx
from mlflow_trt.convert.samples import SampleData, SampleOrigin
from mlflow_trt.core.selection import Fate
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.pipeline.bench import usual_feeds
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.add_engine import add_engine
from mlflow_trt.registry.convert_all import convert_all
from mlflow_trt.registry.convert_version import convert_to_version
from mlflow_trt.registry.plan import plan_conversion
from mlflow_trt.store.folder import read_folder

pytestmark = pytest.mark.slow

DATA = {"x": networks.rows(32)}
WITHOUT_GPU = pytest.mark.skipif(probe().problem is None, reason="is about machines without a GPU")


@pytest.fixture
def bench():
    return Stopwatch()


def save(path, bench, *, model=None, input_example=None, **keywords):
    """Without the picture of the candidates, which takes half of a conversion's time."""
    keywords = {"calibration_data": DATA, "bench": bench} | keywords
    if "recipe" not in keywords:
        keywords = {"precision": "best", "batch": (1, 4, 8)} | keywords
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow_trt.core.figures.is_installed", lambda name: False)
        save_prepared(model or networks.product(), path, prepare(**keywords), input_example=input_example)
    return read_folder(path).record


def fates(record) -> dict[str, Fate]:
    return {str(candidate.precision): candidate.fate for candidate in record.selection.candidates}


def reasons(record) -> dict[str, str]:
    return {str(candidate.precision): candidate.reason for candidate in record.selection.candidates}


def test_the_fastest_that_passes_is_kept_as_if_it_had_been_asked_for(bench, tmp_path):
    record = save(tmp_path / "best", bench)
    assert fates(record) == {
        "fp32": Fate.SLOWER, "tf32": Fate.LEFT_OUT, "fp16": Fate.SLOWER, "bf16": Fate.SLOWER, "int8": Fate.WON,
        "fp8": Fate.LEFT_OUT,
    }  # fmt: skip
    assert record.selection.winner is record.recipe.precision is Precision.INT8
    assert record.selection.reason == "the fastest: 1 ms against 2 ms of fp16"
    assert "TensorRT-RTX ignores the TF32 flag" in reasons(record)["tf32"]
    assert "the default target, which is every GPU from sm80 on, cannot execute fp8" in reasons(record)["fp8"]

    mlflow_trt.save_model(
        networks.product(), tmp_path / "int8", precision="int8", batch=(1, 4, 8), calibration_data=DATA
    )
    asked = read_folder(tmp_path / "int8").record
    assert replace(record, selection=None, engines=()) == replace(asked, engines=())
    assert record.engines[0].file == asked.engines[0].file
    with mlflow_trt.load_model(str(tmp_path / "best"), runtime="onnxruntime") as session:
        assert session.run(DATA)["y"].shape == (32, 8)


def test_errors_are_those_of_the_real_typed_models(bench, tmp_path):
    errors = {str(c.precision): c.relative_error for c in save(tmp_path / "m", bench).selection.candidates}
    assert errors["fp32"] == 0  # on ONNX Runtime it is the source model itself
    assert 1e-5 < errors["fp16"] < 1e-3 < errors["bf16"] < errors["int8"] < 0.05
    assert errors["fp8"] is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", [TRANSFORMER, CLS], ids=lambda model: model.name)
def test_real_models(model, bench, tmp_path):
    recipe = Recipe(**model.recipe, precision="best")
    record = save(tmp_path / "m", bench, model=model.path(), recipe=recipe, calibration_data=calibration_data(model))
    errors = {str(c.precision): c.relative_error for c in record.selection.candidates if c.milliseconds}
    assert set(errors) == {"fp32", "fp16", "bf16", "int8"}
    assert 0 < errors["fp16"] < errors["bf16"] < 0.05
    assert 0 < errors["int8"] < 0.1
    assert record.recipe.precision is Precision.INT8
    feeds = model.feeds(8)
    # Node by node: where a CPU lacks VNNI, the integer kernels of ONNX Runtime's optimizer saturate.
    typed = CpuModel(tmp_path / "m" / record.typed.file, optimize=False)
    with mlflow_trt.load_model(str(tmp_path / "m"), runtime="onnxruntime") as source:
        expected = source.run(feeds)
    assert 0 < relative_error(typed.run([*expected], feeds), expected) < 0.1


def test_rounds_are_interleaved_at_the_usual_shapes_with_all_engines_loaded(bench, tmp_path):
    save(tmp_path / "m", bench)
    tried = ["fp32", "fp16", "bf16", "int8"]
    assert len(bench.order) == 9 * 4
    assert bench.order[:8] == [*tried, *tried[1:], tried[0]]  # each round begins with another
    assert all(sorted(bench.order[start : start + 4]) == sorted(tried) for start in range(0, 36, 4))
    assert all(feeds["x"].shape == (4, 16) for feeds in bench.feeds.values())
    assert np.array_equal(bench.feeds["fp16"]["x"], DATA["x"][:4])
    assert not bench.open


class SmallGpu(Stopwatch):
    """Has room for so many engines at a time; `none_for` have none even alone."""

    def __init__(self, room: int, none_for: tuple[str, ...] = (), **milliseconds):
        super().__init__(**milliseconds)
        self.room, self.none_for = room, none_for

    @contextlib.contextmanager
    def load_engine(self, conversion, feeds):
        if len(self.open) == self.room or str(conversion.recipe.precision) in self.none_for:
            raise OutOfMemoryError("no room for another engine")
        with super().load_engine(conversion, feeds) as run:
            yield run


@pytest.mark.parametrize("room", [1, *exhaustive(3)])
def test_engines_take_turns_where_there_is_no_room_for_all(room, messages, tmp_path):
    bench = SmallGpu(room)
    record = save(tmp_path / "m", bench)
    assert fates(record)["int8"] is Fate.WON
    assert [len(c.milliseconds) for c in record.selection.candidates if c.milliseconds] == [9] * 4
    assert bench.order == [name for name in ("fp32", "fp16", "bf16", "int8") for _ in range(9)]
    assert "The GPU has no room for all engines at once" in messages.text
    assert not bench.open


@pytest.mark.exhaustive
def test_engines_take_turns_where_memory_ends_while_they_run(tmp_path):
    bench = SmallGpu(4, fp16=OutOfMemoryError("no room for an output"))
    record = save(tmp_path / "m", bench)
    assert fates(record)["fp16"] is Fate.NOT_RUN
    assert [len(c.milliseconds) for c in record.selection.candidates if c.milliseconds] == [9] * 3


@pytest.mark.exhaustive
def test_an_engine_without_room_even_alone_is_not_run(tmp_path):
    record = save(tmp_path / "m", SmallGpu(2, none_for=("int8",)))
    assert fates(record)["int8"] is Fate.NOT_RUN
    assert fates(record)["fp16"] is Fate.WON


@pytest.mark.exhaustive
def test_int8_is_tried_where_what_the_model_brings_is_rewritten_in_float(bench, tmp_path):
    """Of uint8, TensorRT has no Q/DQ: it becomes float arithmetic, which int8 quantizes anew."""
    model = quantized(np.uint8(0), scale=0.05)
    record = save(tmp_path / "m", bench, model=model, calibration_data={"x": abs(DATA["x"])})
    assert fates(record)["int8"] in (Fate.WON, Fate.SLOWER)


def test_candidates_are_judged_row_by_row(bench, tmp_path):
    """int8 is the fastest, and right by the norm over all rows: that of the loud one."""
    rows = networks.rows(64)
    rows[0] *= 1000
    record = save(tmp_path / "m", bench, calibration_data={"x": rows})
    assert fates(record)["int8"] is Fate.FAILED_GATE
    assert "relative error of the median" in reasons(record)["int8"]
    assert fates(record)["fp16"] is Fate.WON


def test_usual_feeds_are_samples_of_the_opt_shapes(tmp_path):
    source = read_onnx(networks.transformer(), tmp_path)
    recipe = Recipe(batch=(2, 4, 8), shapes={"input_ids": ((-1, 4), (-1, 24), (-1, 48))})
    sentences = networks.sentences(3, 10)
    data = SampleData(arrays=sentences, origin=SampleOrigin.CALIBRATION_DATA)
    feeds = usual_feeds(convert_in(tmp_path, source, recipe, data=data))
    assert {name: array.shape for name, array in feeds.items()} == {"input_ids": (4, 24), "attention_mask": (4, 24)}
    assert np.array_equal(feeds["input_ids"][:3, :10], sentences["input_ids"])
    assert np.array_equal(feeds["input_ids"][3, 10:20], sentences["input_ids"][0])


def test_a_tie_goes_to_the_more_accurate_one(tmp_path):
    record = save(tmp_path / "m", Stopwatch(fp16=1.01, int8=1.0))
    assert record.recipe.precision is Precision.FP16
    assert "as fast as int8 within the noise, 1.01 ms against 1 ms of int8" in record.selection.reason
    assert fates(record)["int8"] is Fate.LESS_ACCURATE


def test_what_fails_the_gate_loses_with_its_numbers(bench, tmp_path):
    record = save(tmp_path / "m", bench, verify=Tolerance(relative_error=1e-3))
    assert fates(record) | {"tf32": None, "fp8": None} == {
        "fp32": Fate.SLOWER, "tf32": None, "fp16": Fate.WON, "bf16": Fate.FAILED_GATE, "int8": Fate.FAILED_GATE,
        "fp8": None,
    }  # fmt: skip
    assert "at most 0.001 is tolerated" in reasons(record)["bf16"]
    assert record.selection.candidates[4].latency == 1.0  # it is in the picture all the same
    assert record.golden.tolerance.relative_error == 1e-3


@pytest.mark.exhaustive
def test_engines_that_do_not_run_lose(tmp_path):
    broken = Stopwatch(int8=ExecutionError("no kernel image"), fp16=ExecutionError("out of memory"))
    record = save(tmp_path / "m", broken)
    assert record.recipe.precision is Precision.BF16
    assert fates(record)["int8"] is Fate.NOT_RUN
    assert reasons(record)["int8"] == "no kernel image"
    assert broken.order.count("int8") == 1


@pytest.mark.parametrize("data", [None, {"x": networks.rows(7)}])
def test_int8_wants_evidence(bench, data, tmp_path):
    record = save(tmp_path / "m", bench, calibration_data=data)
    assert fates(record)["int8"] is Fate.LEFT_OUT
    assert "pass calibration_data with at least 8 rows" in reasons(record)["int8"]
    assert record.recipe.precision is Precision.FP16


@pytest.mark.exhaustive
def test_an_input_example_is_evidence_and_an_iterator_is_read_once(bench, tmp_path):
    record = save(tmp_path / "example", bench, calibration_data=None, input_example=DATA["x"])
    assert record.recipe.precision is Precision.INT8
    record = save(
        tmp_path / "iterator", bench, calibration_data=({"x": networks.rows(8, seed=seed)} for seed in range(4))
    )
    assert record.recipe.precision is Precision.INT8
    assert record.precision_report.calibration.samples == "32 rows of calibration data"


@pytest.mark.exhaustive
def test_a_comparison_that_proves_nothing_is_enough_for_float32_only(bench, tmp_path, messages):
    record = save(tmp_path / "m", bench, calibration_data={"x": np.zeros((16, 16), np.float32)})
    assert record.recipe.precision is Precision.FP32
    assert fates(record)["fp16"] is Fate.FAILED_GATE
    assert "nothing proves that the fp16 model, emulated on ONNX Runtime, is right" in reasons(record)["fp16"]


@pytest.mark.exhaustive
def test_what_would_be_float32_again_is_left_out(bench, tmp_path):
    recipe = Recipe(precision="best", keep_float32="MatMul")
    record = save(tmp_path / "m", bench, recipe=recipe)
    assert record.recipe.precision is Precision.FP32
    for precision in ("fp16", "bf16", "int8"):
        assert fates(record)[precision] is Fate.LEFT_OUT
        assert reasons(record)[precision] == f"nothing of this model runs in {precision}"


@pytest.mark.exhaustive
def test_targets_that_execute_fp8_have_it_tried(tmp_path):
    record = save(tmp_path / "m", Stopwatch("sm89", fp8=0.5), targets=["sm89"])
    assert record.recipe.precision is Precision.FP8
    assert record.engines[0].target == "sm89"


def test_engines_for_other_gpus_cannot_be_measured_here(bench, tmp_path):
    with pytest.raises(RecipeError, match=r"a GPU \(sm86\), and the targets are sm89, sm120; add sm86"):
        save(tmp_path / "m", bench, targets=["sm89", "sm120"])
    with pytest.raises(RecipeError, match=r"give targets=\['sm75'\]"):
        save(tmp_path / "m", Stopwatch("sm75"))


def test_without_verification_there_is_nothing_to_choose_by(bench, tmp_path):
    with pytest.raises(RecipeError, match="verify=False leaves nothing to choose by"):
        save(tmp_path / "m", bench, verify=False)
    assert not bench.feeds


def test_the_recipe_is_to_blame_for_what_is_wrong_whatever_the_precision(bench, tmp_path):
    with pytest.raises(RecipeError, match="keep_float32 names 'Sotfmax'"):
        save(tmp_path / "m", bench, recipe=Recipe(precision="best", keep_float32="Sotfmax"))
    with pytest.raises(RecipeError, match="cannot build for sm99"):
        save(tmp_path / "m", Stopwatch("sm99"), targets=["sm99"])
    with pytest.raises(mlflow_trt.UnsupportedModelError):
        save(tmp_path / "m", bench, model=networks.through_int16(), batch=None, calibration_data=None)
    assert not (tmp_path / "m").exists()


def test_where_none_passes_the_error_shows_all_of_them(store):
    broken = ExecutionError("no kernel image")
    strict = Tolerance(relative_error=1e-6)
    prepared = prepare(precision="best", calibration_data=DATA, verify=strict, bench=Stopwatch(fp32=broken))
    with pytest.raises(AccuracyError, match="precision 'best' found no engine that passes") as caught:
        log_prepared(networks.product(), prepared, name="m", registered_model_name="product")
    for text in ("fp32: not run: no kernel image", "fp16: failed the gate", "int8: failed the gate", "fp8: left out"):
        assert text in caught.value.message
    assert caught.value.comparison.relative_error < 1e-3  # the nearest
    assert store.is_untouched()
    nowhere = Stopwatch(**dict.fromkeys(("fp32", "fp16", "bf16", "int8"), broken))
    prepared = prepare(precision="best", calibration_data=DATA, bench=nowhere)
    with pytest.raises(ExecutionError, match="fp16: not run: no kernel image") as failed:
        log_prepared(networks.product(), prepared, name="m")
    assert not isinstance(failed.value, BuildError)
    assert store.is_untouched()


def test_table_picture_params_and_metrics(bench, store):
    prepared = prepare(precision="best", batch=(1, 4, 8), calibration_data=DATA, bench=bench)
    info = log_prepared(networks.product(), prepared, name="m", registered_model_name="product")
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    report = (folder / "precision_report.md").read_text()
    assert "## Candidates for best: int8 won" in report
    assert "| int8 | won | 1 |" in report
    assert "Latency is that of the engine alone on a stopwatch, with x 4x16." in report
    assert (folder / "candidates.png").stat().st_size > 10_000
    assert store.client.get_model_version("product", "1").tags["mlflow_trt.precision"] == "int8"
    assert store.client.get_logged_model(info.model_id).params["mlflow_trt.precision_asked"] == "best"
    metrics = {metric.key: metric.value for metric in store.client.get_logged_model(info.model_id).metrics}
    assert metrics["mlflow_trt/candidates/fp16/latency_ms"] == 2.0
    assert metrics["mlflow_trt/candidates/int8/relative_error"] == pytest.approx(metrics["mlflow_trt/y/relative_error"])


@pytest.mark.exhaustive
def test_without_matplotlib_there_is_the_table_and_a_word(bench, tmp_path, messages):
    save(tmp_path / "m", bench)
    assert not (tmp_path / "m" / "candidates.png").exists()
    assert "| int8 | won |" in (tmp_path / "m" / "precision_report.md").read_text()
    assert (
        "as a table, and not as a picture: pictures need matplotlib: `pip install 'mlflow-trt[plots]'`" in messages.text
    )


@pytest.mark.exhaustive
def test_progress_goes_one_way_and_names_the_candidate(bench, tmp_path):
    events = []
    save(tmp_path / "m", bench, progress=events.append)
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] <= 1
    phases = [event.phase for event in events]
    assert any(phase.startswith("bf16: ") for phase in phases)
    assert phases[-1] == "measuring, round 9 of 9"


def test_a_version_is_found_again_and_gets_engines_of_the_winners_precision(bench, store):
    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    prepared = prepare(precision="best", batch=(1, 4, 8), calibration_data=DATA, bench=bench)
    made = convert_to_version("models:/p/1", "p-trt", prepared)
    bench.order.clear()
    assert convert_to_version("models:/p/1", "p-trt", prepared).version == made.version
    assert not bench.order
    plan = plan_conversion("models:/p/1", prepared, registered_model_name="p-trt")
    assert plan.existing == "models:/p-trt/1"
    extended = add_engine("models:/p-trt/1", targets="sm120")
    record = read_record(f"models:/p-trt/{extended.version}")
    assert record.recipe.precision is Precision.INT8
    assert record.selection.winner is Precision.INT8
    assert [engine.target for engine in record.engines] == ["sm80plus", "sm120"]


@pytest.mark.exhaustive
def test_all_models_that_a_filter_finds(bench, store):
    for name in ("a", "b"):
        mlflow.onnx.log_model(networks.product(), name=name, registered_model_name=name, pip_requirements=["onnx"])
    recipe = Recipe(precision="best", batch=(1, 4, 8))
    outcomes = convert_all("name LIKE '%'", ConversionOptions(recipe=recipe, calibration_data=DATA, bench=bench))
    assert [(outcome.status, outcome.detail) for outcome in outcomes] == [
        ("converted", "models:/a-trt/1"), ("converted", "models:/b-trt/1"),
    ]  # fmt: skip
    assert store.client.get_model_version("b-trt", "1").tags["mlflow_trt.precision"] == "int8"


@pytest.mark.parametrize(
    "line", [["--best"], *exhaustive(["--precision", "best"], ["--from-trtexec", "trtexec --best"])]
)
def test_the_command(line, bench, tmp_path):
    model, data, output = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "m"
    model.write_bytes(networks.product().SerializeToString())
    np.savez(data, **DATA)
    arguments = ["convert", *line, "--onnx", str(model), "--output", str(output), "--calibration-data", str(data)]
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, arguments, obj=ConversionOptions(bench=bench))
    assert result.exit_code == 0, result.output
    assert "candidates, measured on a stopwatch" in result.stdout
    assert "best; int8 is the fastest: 1 ms against 2 ms of fp16" in result.stdout
    _, shown, _ = run("inspect", output)
    assert "candidates, measured on a stopwatch" in shown
    _, text, _ = run("inspect", output, "--json")
    selection = json.loads(text)["selection"]
    assert (selection["winner"], selection["asked"], selection["shapes"]) == ("int8", "best", {"x": [8, 16]})


def test_a_model_folder_from_before_has_no_selection(magika_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(magika_folder, folder)
    content = json.loads((folder / "mlflow_trt.json").read_text())
    del content["selection"]
    (folder / "mlflow_trt.json").write_text(json.dumps(content))
    assert read_folder(folder).record.selection is None


@WITHOUT_GPU
class TestWithoutAGpu:
    def test_it_is_refused_before_any_work(self, store, tmp_path):
        said = (
            "precision 'best' measures engines on a GPU, and this machine cannot: "
            r".*[^.]\. Convert .* or name a precision: fp32, fp16"
        )
        missing = tmp_path / "missing.onnx"  # nobody looks at it
        with pytest.raises(RuntimeUnavailableError, match=said):
            mlflow_trt.save_model(missing, tmp_path / "m", precision="best")
        with pytest.raises(RuntimeUnavailableError, match=said):
            mlflow_trt.log_model(missing, name="m", precision="best", registered_model_name="m")
        with pytest.raises(RuntimeUnavailableError, match=said):
            mlflow_trt.convert_model_version("models:/missing/1", "m", precision="best")
        with pytest.raises(RuntimeUnavailableError, match=said):
            convert_all("name LIKE '%'", ConversionOptions(recipe=Recipe(precision="best")))
        assert not (tmp_path / "m").exists()
        assert store.is_untouched()

    @pytest.mark.parametrize("more", [[], ["--dry-run"]])
    def test_by_the_command_too(self, more, tmp_path):
        model = tmp_path / "model.onnx"
        model.write_bytes(networks.product().SerializeToString())
        code, _, errors = run("convert", model, "--best", "--output", tmp_path / "m", *more)
        assert code == 1
        assert "precision 'best' measures engines on a GPU, and this machine cannot" in errors
        assert "Convert on a GPU machine" in errors
        assert not (tmp_path / "m").exists()

    def test_a_missing_package_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr("mlflow_trt.backends.onnxruntime.is_installed", lambda name: False)
        with pytest.raises(MissingDependencyError, match="pip install onnxruntime") as caught:
            save(tmp_path / "m", None)
        assert "onnxruntime" in caught.value.packages
