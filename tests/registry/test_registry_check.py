"""`mlflow-trt registry check` finds what killed conversions left, and mends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import mlflow
import networks
import pytest
from registries import registry_state
from typer.testing import CliRunner

import mlflow_trt
from mlflow_trt import OptionError
from mlflow_trt.cli import app
from mlflow_trt.flavor.register import model_id_of
from mlflow_trt.registry.check import check_registered_model


@pytest.fixture
def source(store):
    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    return store


def convert(name="p.trt", **options):
    return mlflow_trt.convert_model_version("models:/p/1", name, batch=4, precision="fp16", **options)


def killed_at(step, store):
    """Convert in a process that is killed when it comes to `step`."""
    program = f"""
import os, signal
import mlflow, mlflow.models, mlflow_trt
{step} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
mlflow_trt.convert_model_version("models:/p/1", "p.trt", batch=8, precision="fp16")
"""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_ID": store.experiment_id}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr


def problems(**options):
    return {finding.problem for finding in check_registered_model("models:/p.trt", **options)}


def test_nothing_is_found_where_nothing_is_wrong(source):
    convert(alias="champion")
    assert check_registered_model("p.trt", minutes=0) == []
    assert CliRunner().invoke(app, ["registry", "check", "models:/p.trt", "--minutes", "0"]).exit_code == 0
    with pytest.raises(OptionError, match="there is no registered model q"):
        check_registered_model("models:/q")


def test_what_a_version_lacks_is_put_there(source, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("mlflow_trt.flavor.conversions.log_metrics", lambda *_, **__: None)
        convert()
    client = source.client
    complete = client.get_model_version("p.trt", "1")
    for key in complete.tags:
        client.delete_model_version_tag("p.trt", "1", key)
    (pointer,) = client.get_model_version("p", "1").tags
    client.delete_model_version_tag("p", "1", pointer)

    result = CliRunner().invoke(app, ["registry", "check", "models:/p.trt", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [finding["can_be_mended"] for finding in found] == [True, True, True]
    assert found[0]["problem"] == f"it lacks the tags {', '.join(sorted(complete.tags))}"
    assert problems() == {finding["problem"] for finding in found}

    assert CliRunner().invoke(app, ["registry", "check", "models:/p.trt", "--mend"]).exit_code == 0
    mended = client.get_model_version("p.trt", "1")
    assert mended.tags == complete.tags
    assert client.get_model_version("p", "1").tags[pointer] == "models:/p.trt/1"
    assert client.get_logged_model(model_id_of(mended)).metrics
    assert problems() == set()


@pytest.mark.exhaustive
def test_what_a_killed_conversion_left_is_taken_away_once_it_is_old(source):
    killed_at("mlflow.models.Model.log", source)
    killed_at("mlflow.log_metrics", source)
    convert()
    before = registry_state(source.client)
    assert problems(mend=True) == set()  # it may still be at work
    assert registry_state(source.client) == before

    assert problems(minutes=0, mend=True) == {"it was never finished", "it was never registered", "it was left running"}
    assert problems(minutes=0) == set()
    # The source and the one conversion that ended.
    assert len(source.logged_models()) == 2
    assert {run.info.status for run in source.client.search_runs([source.experiment_id])} == {"KILLED", "FINISHED"}
    assert str(convert().version) == "1"


def test_of_two_versions_of_one_conversion_the_one_without_an_alias_goes(source):
    made = convert()
    again = source.client.create_model_version("p.trt", made.source, tags=made.tags, model_id=model_id_of(made))
    source.client.set_registered_model_alias("p.trt", "champion", again.version)
    assert problems(mend=True) == {
        "another version was made of its logged model by the same conversion",
        "its source models:/p/1 lacks the tag mlflow_trt.converted_to.p.trt.2",
    }
    assert source.client.get_model_version("p", "1").tags["mlflow_trt.converted_to.p.trt.2"] == "models:/p.trt/2"
    assert [str(version.version) for version in source.client.search_model_versions("name = 'p.trt'")] == ["2"]


def test_a_version_with_one_more_engine_is_made_of_the_one_before(source):
    convert()
    mlflow_trt.add_engine("models:/p.trt/1", targets="sm120")
    assert problems() == set()
    source.client.delete_model_version_tag("p.trt", "1", "mlflow_trt.converted_to.p.trt.2")
    assert problems(mend=True) == {"its source models:/p.trt/1 lacks the tag mlflow_trt.converted_to.p.trt.2"}
    assert source.client.get_model_version("p.trt", "1").tags["mlflow_trt.converted_to.p.trt.2"] == "models:/p.trt/2"


def test_what_cannot_be_loaded_is_only_told(source):
    made = convert(alias="champion")
    source.client.delete_logged_model(model_id_of(made))
    (finding,) = check_registered_model("p.trt", mend=True)
    assert finding.subject == "version 1, which the alias champion points to"
    assert f"the logged model {model_id_of(made)} behind models:/p.trt/1 was deleted" in finding.problem
    assert not finding.is_mended
    assert str(source.client.get_model_version_by_alias("p.trt", "champion").version) == "1"
    source.client.delete_model_version("p.trt", "1")
    assert problems(mend=True) == {"it has no versions"}
