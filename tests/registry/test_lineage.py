"""Versions know what they were made from and what was made of them; a failure leaves the registry as it was."""

from __future__ import annotations

import tempfile

import mlflow
import networks
import numpy as np
import onnx
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.models import infer_signature
from registries import failing, register, registry_state
from tiers import exhaustive
from tracking_server import tracking_server

import mlflow_trt
from mlflow_trt import InputError, RecipeError
from mlflow_trt.flavor.fetch import read_record
from mlflow_trt.pipeline.options import ConversionOptions
from mlflow_trt.registry import convert_version as registry
from mlflow_trt.registry.check import check_registered_model
from mlflow_trt.registry.convert_all import convert_all


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    with tracking_server(tmp_path_factory.mktemp("server"), empty_database) as address:
        yield address


@pytest.fixture
def client(server, request):
    """A client of the server. Each test registers models under names of its own."""
    mlflow.set_tracking_uri(server)
    mlflow.set_experiment(request.node.name)
    return MlflowClient()


def test_it_is_found_in_both_directions(client):
    register("a")
    made = mlflow_trt.convert_model_version("models:/a/1", "a-trt", batch=(1, 4, 8))
    other = mlflow_trt.convert_model_version("models:/a/1", "a-trt", batch=16)

    found = client.search_model_versions("tags.`mlflow_trt.source` = 'models:/a/1'")
    assert {version.version for version in found} == {made.version, other.version}
    assert len(client.search_model_versions("tags.`mlflow_trt.source` LIKE 'models:/a/%'")) == 2
    (source,) = client.search_model_versions("tags.`mlflow_trt.converted_to.a-trt.2` = 'models:/a-trt/2'")
    assert (source.name, str(source.version)) == ("a", "1")
    assert source.tags["mlflow_trt.converted_to.a-trt.1"] == "models:/a-trt/1"
    record = read_record("models:/a-trt/1")
    assert (record.lineage["name"], record.lineage["version"]) == ("a", "1")
    assert record.source.digest == read_record("models:/a-trt/2").source.digest
    assert made.tags["mlflow_trt.fingerprint"] != other.tags["mlflow_trt.fingerprint"]


def test_what_belongs_to_the_source_is_carried_over(client):
    x = networks.rows(2)
    signature = infer_signature({"x": x}, {"y": networks.rows(2, 8)})
    register("b", signature=signature, input_example={"x": x}, metadata={"owner": "vision"})
    client.update_model_version("b", "1", "What people need to know.")
    client.set_model_version_tag("b", "1", "stage", "candidate")
    client.set_model_version_tag("b", "1", "team", "a")

    made = mlflow_trt.convert_model_version("models:/b/1", "b-trt", batch=(1, 4, 8), tags={"team": "b"})

    line, empty, text = made.description.splitlines()
    assert line == "fp32, batch 1:4:8, sm80plus, from models:/b/1, error not measured"
    assert (empty, text) == ("", "What people need to know.")
    assert (made.tags["stage"], made.tags["team"]) == ("candidate", "b")
    model = mlflow.models.Model.load("models:/b-trt/1")
    assert model.signature == signature
    assert model.metadata == {"owner": "vision"}
    assert np.array_equal(mlflow.pyfunc.load_model("models:/b-trt/1", model_config={"runtime": "onnxruntime"})
                          .input_example["x"], x)  # fmt: skip
    # Neither what MLflow nor what this package wrote about the source.
    assert not [tag for tag in made.tags if tag.startswith(("mlflow.", "mlflow_trt.converted_to"))]


def test_the_same_again_is_found(client, messages, monkeypatch):
    register("c")
    first = mlflow_trt.convert_model_version("models:/c/1", "c-trt", batch=(1, 4, 8))
    with monkeypatch.context() as patched:
        patched.setattr(registry, "log_conversion", None)
        again = mlflow_trt.convert_model_version("models:/c/1", "c-trt", batch=(1, 4, 8), alias="best")
    assert again.version == first.version
    assert "models:/c-trt/1 was made of the same source by the same recipe" in messages.text
    assert str(client.get_model_version_by_alias("c-trt", "best").version) == "1"

    assert str(mlflow_trt.convert_model_version("models:/c/1", "c-trt", batch=(1, 4, 9)).version) == "2"
    settings = {"runtime": "auto"}
    assert str(mlflow_trt.convert_model_version("models:/c/1", "c-trt", batch=(1, 4, 8), model_config=settings)
               .version) == "3"  # fmt: skip
    assert str(mlflow_trt.convert_model_version("models:/c/1", "c-trt", batch=(1, 4, 8), force=True).version) == "4"
    register("c", width=17)
    assert str(mlflow_trt.convert_model_version("models:/c/2", "c-trt", batch=(1, 4, 8)).version) == "5"


def test_of_two_sources_with_the_same_bytes_each_gets_its_own(client):
    register("d")
    register("d")
    mlflow_trt.convert_model_version("models:/d/1", "d-trt", batch=4)
    made = mlflow_trt.convert_model_version("models:/d/2", "d-trt", batch=4)
    assert (str(made.version), made.tags["mlflow_trt.source"]) == ("2", "models:/d/2")


@pytest.mark.exhaustive
def test_of_two_logged_models_with_the_same_bytes_each_gets_its_own(client):
    register("m")
    (first,) = mlflow.search_logged_models(output_format="list")
    columns = infer_signature(pd.DataFrame(np.zeros((1, 16), np.float32)))
    second = mlflow.onnx.log_model(networks.product(), name="n", signature=columns, pip_requirements=["onnx"])
    for model_id, expected in ((first.model_id, "1"), (second.model_id, "2"), (first.model_id, "1")):
        made = mlflow_trt.convert_model_version(f"models:/{model_id}", "m-trt", batch=4)
        assert (str(made.version), made.tags["mlflow_trt.source"]) == (expected, f"models:/{model_id}")
    assert mlflow.models.get_model_info("models:/m-trt/2").signature.inputs == columns.inputs


def with_the_tags_of_before(client, name, number):
    """The tags of a version as releases put them on that knew no fingerprint."""
    record = read_record(f"models:/{name}/{number}")
    client.delete_model_version_tag(name, number, "mlflow_trt.fingerprint")
    for key, text in {
        "tensorrt": f"{record.engines[0].distribution} {record.engines[0].version}",
        "source_name": record.lineage["name"],
        "source_version": record.lineage["version"],
        "source_digest": record.source.digest,
        "recipe_digest": record.lineage["recipe_digest"],
    }.items():
        client.set_model_version_tag(name, number, f"mlflow_trt.{key}", text)
    return client.get_model_version(name, number).tags


@pytest.mark.exhaustive
def test_versions_with_the_tags_of_before_are_found_as_they_are(client):
    register("old")
    mlflow_trt.convert_model_version("models:/old/1", "old-trt", batch=4)
    mlflow_trt.convert_model_version("models:/old/1", "old-trt", batch=8)
    tags = with_the_tags_of_before(client, "old-trt", "1")
    assert str(mlflow_trt.convert_model_version("models:/old/1", "old-trt", batch=4).version) == "1"
    assert client.get_model_version("old-trt", "1").tags == tags
    assert check_registered_model("old-trt") == []
    assert [outcome.status for outcome in convert_all("name = 'old-trt'", ConversionOptions(), dry_run=True)] == [
        "skipped"
    ]
    extended = mlflow_trt.add_engine("models:/old-trt/1", targets="sm120")
    assert set(extended.tags) == {
        f"mlflow_trt.{name}" for name in ("source", "precision", "target", "fingerprint", "extends", "conversion")
    }
    assert str(mlflow_trt.convert_model_version("models:/old/1", "old-trt", batch=16).version) == "4"


@pytest.mark.exhaustive
def test_a_fingerprint_alone_is_not_believed(client):
    register("short")
    first = mlflow_trt.convert_model_version("models:/short/1", "short-trt", batch=4)
    other = mlflow_trt.convert_model_version("models:/short/1", "short-trt", batch=8)
    key = "mlflow_trt.fingerprint"
    client.set_model_version_tag("short-trt", "2", key, first.tags[key])
    client.set_model_version_tag("short-trt", "1", key, other.tags[key])
    assert str(mlflow_trt.convert_model_version("models:/short/1", "short-trt", batch=4).version) == "3"


def test_a_file_is_found_again_too(client, tmp_path):
    (tmp_path / "one.onnx").write_bytes(networks.product().SerializeToString())
    (tmp_path / "two.onnx").write_bytes(networks.product().SerializeToString())
    first = mlflow_trt.convert_model_version(tmp_path / "one.onnx", "e-trt", batch=4)
    assert mlflow_trt.convert_model_version(tmp_path / "two.onnx", "e-trt", batch=4).version == first.version


@pytest.mark.parametrize(
    "error", [RuntimeError("the server went away"), *exhaustive(KeyboardInterrupt())], ids=["error", "ctrl-c"]
)
@pytest.mark.parametrize(
    "step",
    [
        "mlflow.tracking.client.MlflowClient.log_model_artifacts",
        "mlflow.MlflowClient.create_registered_model",
        "mlflow.MlflowClient.create_model_version",
        *exhaustive(
            "mlflow.MlflowClient.set_logged_model_tags",
            "mlflow.MlflowClient.search_runs",
            "mlflow_trt.registry.convert_version.point_to",
            "mlflow.MlflowClient.set_registered_model_alias",
        ),
    ],
)
def test_whatever_fails_the_registry_is_as_it_was(step, error, client, monkeypatch):
    if not client.search_registered_models("name = 'f'"):
        register("f")
        client.update_model_version("f", "1", "described")
    before = registry_state(client)
    with monkeypatch.context() as patched:
        patched.setattr(step, failing(error))
        with pytest.raises(type(error)):
            mlflow_trt.convert_model_version("models:/f/1", "f-trt", batch=4, precision="fp16", alias="champion")
    assert registry_state(client) == before


@pytest.mark.exhaustive
def test_an_interruption_while_temporary_folders_are_removed_is_a_failure_too(client, monkeypatch):
    register("tidied")
    before = registry_state(client)
    cleanup = tempfile.TemporaryDirectory.cleanup

    def interrupted(folder):
        cleanup(folder)
        if client.search_registered_models("name = 'tidied-trt'"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tempfile.TemporaryDirectory, "cleanup", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mlflow_trt.convert_model_version("models:/tidied/1", "tidied-trt", batch=4, alias="champion")
    assert registry_state(client) == before


@pytest.mark.exhaustive
def test_versions_that_were_there_stay(client, monkeypatch):
    register("g")
    mlflow_trt.convert_model_version("models:/g/1", "g-trt", batch=4, alias="champion")
    before = registry_state(client)
    with monkeypatch.context() as patched:
        patched.setattr(registry, "set_alias", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            mlflow_trt.convert_model_version("models:/g/1", "g-trt", batch=8, alias="champion")
    assert registry_state(client) == before


def test_an_alias_is_set_last_and_only_where_all_went_well(client, monkeypatch):
    register("h")
    with pytest.raises(RecipeError):
        mlflow_trt.convert_model_version("models:/h/1", "h-trt", batch=(8, 4, 2), alias="champion")
    with monkeypatch.context() as patched:
        patched.setattr(registry, "log_conversion", None)  # nothing is built for an alias that MLflow refuses
        for alias in ("not/allowed", "v1", "latest"):
            with pytest.raises(mlflow.MlflowException, match="alias"):
                mlflow_trt.convert_model_version("models:/h/1", "h-trt", alias=alias)
    assert not client.search_registered_models("name = 'h-trt'")
    mlflow_trt.convert_model_version("models:/h/1", "h-trt", batch=4, alias="champion")
    assert str(client.get_model_version_by_alias("h-trt", "champion").version) == "1"


@pytest.mark.parametrize(
    ("cells", "message"),
    [([np.zeros(16), np.zeros(3)], "the cells of column 'x' differ in shape"), ([], "there are no rows")],
)
def test_calibration_data_that_makes_no_arrays_is_refused_as_ever(cells, message, client, tmp_path):
    onnx.save(networks.product(), tmp_path / "p.onnx")
    with pytest.raises(InputError, match=message):
        mlflow_trt.convert_model_version(
            tmp_path / "p.onnx", "p-trt", calibration_data=pd.DataFrame({"x": pd.Series(cells, dtype=object)})
        )


@pytest.mark.exhaustive
def test_other_calibration_data_or_tolerance_makes_another_version(client, tmp_path):
    register("i")
    np.savez(tmp_path / "data.npz", x=networks.rows(16))
    data = {"x": networks.rows(16)}

    def version(**options):
        made = mlflow_trt.convert_model_version("models:/i/1", "i-trt", batch=(1, 4, 8), **options)
        return int(made.version)

    assert version(calibration_data=data) == version(calibration_data={"x": data["x"].copy()}) == 1
    assert version(calibration_data={"x": networks.rows(17)}) == 2
    assert version(calibration_data=tmp_path / "data.npz") == version(calibration_data=tmp_path / "data.npz") == 3
    assert version() == 4
    assert version(verify=mlflow_trt.Tolerance(relative_error=0.5)) == 5
    assert version(verify=False) == 6
    assert version(verify=True) == 4
    assert version(calibration_data=iter([data])) == 7


def test_what_the_accuracy_gate_refuses_gets_neither_version_nor_alias(client):
    register("j")
    before = registry_state(client)
    strict = mlflow_trt.Tolerance(max_abs_error=0)
    with pytest.raises(mlflow_trt.AccuracyError):
        mlflow_trt.convert_model_version(
            "models:/j/1", "j-trt", precision="fp16", batch=4, verify=strict, alias="champion",
            calibration_data={"x": networks.rows(8)},
        )  # fmt: skip
    assert registry_state(client) == before
