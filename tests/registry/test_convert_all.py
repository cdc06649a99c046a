"""Many models at once, and plans without doing anything."""

from __future__ import annotations

import json

import mlflow
import networks
import pytest
from command_line import run
from helpers import Store, prepare
from mlflow.exceptions import MlflowException

import mlflow_trt
from mlflow_trt import InputError, OptionError, Recipe, RecipeError
from mlflow_trt.cli.options import default_name
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry.convert_all import convert_all
from mlflow_trt.registry.plan import plan_conversion


@pytest.fixture(scope="module")
def logged(module_store):
    """Two models to convert, one that cannot be, one without versions, and one that is not for the GPU."""
    for name, network in (
        ("a", networks.product()),
        ("b", networks.product(width=8)),
        ("broken", networks.through_int16()),
        ("other", networks.product()),
    ):
        mlflow.onnx.log_model(network, name=name, registered_model_name=name, pip_requirements=["onnx"])
    module_store.client.create_registered_model("empty")
    for name in ("a", "b", "broken", "empty"):
        module_store.client.set_registered_model_tag(name, "deploy", "gpu")
    return module_store


@pytest.fixture
def models(logged, tmp_path):
    return Store.copy_of(logged, tmp_path / "store")


FILTER = "tags.deploy = 'gpu'"


def statuses(outcomes):
    return {outcome.source: outcome.status for outcome in outcomes}


def test_goes_on_after_a_failure(models):
    seen = []
    outcomes = convert_all(FILTER, ConversionOptions(recipe=Recipe(batch=4)), alias="champion", on_outcome=seen.append)
    assert seen == outcomes
    assert statuses(outcomes) == {
        "models:/a/1": "converted", "models:/b/1": "converted", "models:/broken/1": "failed",
        "models:/empty": "skipped",
    }  # fmt: skip
    (failure,) = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert "cannot run 1 node(s), unnamed (Cast)" in failure.detail
    names = {model.name for model in models.client.search_registered_models()}
    assert names == {"a", "b", "broken", "empty", "other", "a-trt", "b-trt"}
    assert str(models.client.get_model_version_by_alias("b-trt", "champion").version) == "1"


@pytest.mark.exhaustive
def test_the_same_again_finds_what_is_there(models):
    convert_all(FILTER, ConversionOptions(recipe=Recipe(batch=4)), name_pattern="gpu.{name}")
    again = statuses(convert_all(FILTER, ConversionOptions(recipe=Recipe(batch=4)), name_pattern="gpu.{name}"))
    assert again["models:/a/1"] == again["models:/b/1"] == "exists"
    dry = statuses(
        convert_all(FILTER, ConversionOptions(recipe=Recipe(batch=8)), name_pattern="gpu.{name}", dry_run=True)
    )
    assert dry["models:/a/1"] == "planned"
    assert len(models.client.search_model_versions("name = 'gpu.a'")) == 1


@pytest.mark.exhaustive
def test_what_was_made_is_not_converted_again(models):
    mlflow_trt.convert_model_version("models:/a/1", "a", batch=4)
    mlflow_trt.log_model(networks.product(), name="b", registered_model_name="b", batch=4)
    outcomes = convert_all(FILTER, ConversionOptions(recipe=Recipe(batch=4)), dry_run=True)
    assert statuses(outcomes)["models:/a/2"] == statuses(outcomes)["models:/b/2"] == "skipped"


def test_a_name_for_all_is_refused(models):
    with pytest.raises(OptionError, match="write {name} where the source's name goes"):
        convert_all(FILTER, ConversionOptions(recipe=Recipe()), name_pattern="all")


def test_a_plan_does_nothing_and_knows_what_exists(models):
    before = len(models.logged_models())
    plan = plan_conversion("models:/a/1", prepare(batch=(1, 4, 8)), registered_model_name="a-trt")
    assert (plan.existing, plan.destination) == (None, "a version of a-trt")
    assert plan.profiles[0].ranges["x"].max == (8, 16)
    assert len(models.logged_models()) == before
    mlflow_trt.convert_model_version("models:/a/1", "a-trt", batch=(1, 4, 8))
    plan = plan_conversion("models:/a/1", prepare(batch=(1, 4, 8)), registered_model_name="a-trt")
    assert plan.existing == "models:/a-trt/1"
    with pytest.raises(RecipeError, match="cannot build for sm70"):
        plan_conversion("models:/a/1", prepare(targets=["sm70"]))


def test_a_plan_refuses_what_the_conversion_would(models, tmp_path):
    def both(message, error, **options):
        alias = options.pop("alias", None)
        with pytest.raises(error, match=message):
            plan_conversion("models:/a/1", prepare(**options), registered_model_name="a-trt", alias=alias)
        with pytest.raises(error, match=message):
            mlflow_trt.convert_model_version("models:/a/1", "a-trt", alias=alias, **options)

    both("int8 is calibrated on real inputs", RecipeError, precision="int8")
    both("none.npz does not exist", InputError, calibration_data=tmp_path / "none.npz")
    both("expected 16 at axis 1", InputError, calibration_data={"x": networks.rows(8, 3)})
    both("reserved", MlflowException, alias="latest")
    plan_conversion("models:/a/1", prepare(precision="int8", calibration_data={"x": networks.rows(8)}))


class TestCommand:
    @pytest.fixture
    def tracking(self, models):
        return {"MLFLOW_TRACKING_URI": models.uri, "MLFLOW_EXPERIMENT_ID": models.experiment_id}

    def test_ends_with_a_table_and_exits_with_1(self, tracking):
        code, output, errors = run("convert", "--all", FILTER, "--batch", "4", **tracking)
        assert code == 1
        rows = {line.split()[0]: line for line in output.splitlines() if line.startswith("models:/")}
        assert "converted  models:/a-trt/1" in rows["models:/a/1"]
        assert "failed" in rows["models:/broken/1"]
        assert "Traceback" not in errors

    def test_a_dry_run_as_json(self, tracking):
        code, output, _ = run("convert", "models:/a/1", "--dry-run", "--batch", "1:4:8", "--json", **tracking)
        assert code == 0
        plan = json.loads(output)
        assert plan["profiles"][0]["ranges"]["x"]["max"] == [8, 16]
        code, output, _ = run("convert", "models:/a/1", "--register-as", "t", "--dry-run", "--batch", "4", **tracking)
        assert code == 0
        assert "a version of t" in output

    def test_a_line_of_trtexec_runs(self, tmp_path):
        (tmp_path / "p.onnx").write_bytes(networks.product().SerializeToString())
        line = f"trtexec --onnx={tmp_path}/p.onnx --saveEngine={tmp_path}/p.plan --optShapes=x:4x16 --minTiming=3"
        code, output, errors = run("convert", "--from-trtexec", line, "--json")
        assert code == 0, errors
        assert json.loads(output)["recipe"]["precision"] == "tf32"
        assert f"The same as: mlflow-trt convert --onnx {tmp_path}/p.onnx" in errors
        assert "--minTiming is left out" in errors
        assert (tmp_path / "p.plan").stat().st_size == json.loads(output)["engines"][0]["size"]

    @pytest.mark.parametrize("more", [[], ["--dry-run"]])
    def test_a_place_where_no_engine_can_be_written_is_refused_first(self, more, models, tracking, tmp_path):
        (tmp_path / "file").touch()
        for path, message in (
            (tmp_path, "is a folder; name a file"),
            (tmp_path / "file" / "p.plan", "cannot be written"),
        ):
            code, _, errors = run(
                "convert", "models:/a/1", "--register-as", "a-trt", "--save-engine", path, *more, **tracking
            )
            assert code == 1
            assert message in errors
        assert not models.client.search_model_versions("name = 'a-trt'")

    @pytest.mark.exhaustive
    def test_a_registered_source_has_a_default_name(self, tracking):
        code, output, errors = run("convert", "models:/a/1", "--target", "sm86", "--target", "sm120", **tracking)
        assert code == 0, errors
        assert "models:/a-trt/1" in output


def test_default_names():
    assert default_name("models:/a.b@champion") == "a.b-trt"
    assert default_name("models:/a/3") == "a-trt"
    for source in ("model.onnx", "models:/m-0123", "runs:/0123/model", "models:/a/3/file"):
        assert default_name(source) == ""
