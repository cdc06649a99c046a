"""The commands one after the other, against a real tracking server that hands out the artifacts itself."""

from __future__ import annotations

import json

import mlflow
import networks
import numpy as np
import pytest
from command_line import run
from mlflow import MlflowClient
from tracking_server import tracking_server

pytestmark = [pytest.mark.server, pytest.mark.exhaustive]


@pytest.fixture
def environment(tmp_path, empty_database):
    with tracking_server(tmp_path, empty_database) as address:
        mlflow.set_tracking_uri(address)
        mlflow.set_experiment("commands")
        yield {"MLFLOW_TRACKING_URI": address, "MLFLOW_EXPERIMENT_NAME": "commands", "CUDA_VISIBLE_DEVICES": ""}


def test_from_a_registered_model_to_a_comparison(environment, tmp_path):
    def command(*arguments):
        code, output, errors = run(*arguments, "--json", **environment)
        assert code == 0, errors
        return json.loads(output)

    mlflow.onnx.log_model(networks.product(), name="p", registered_model_name="p", pip_requirements=["onnx"])
    client = MlflowClient()
    client.set_registered_model_alias("p", "champion", "1")
    client.set_registered_model_tag("p", "deploy", "gpu")

    made = command(
        "convert", "models:/p@champion", "--precision", "fp16", "--batch", "1:8:64", "--register-as", "p-trt",
        "--alias", "challenger",
    )  # fmt: skip
    assert (made["uri"], made["recipe"]["precision"]) == ("models:/p-trt/1", "fp16")
    assert str(client.get_model_version_by_alias("p-trt", "challenger").version) == "1"

    made = command("convert", "models:/p/1", "--target", "sm86", "--target", "sm89", "--target", "sm120")
    assert made["engines"][0]["compute_capabilities"] == ["sm86", "sm89", "sm120"]
    (outcome,) = command("convert", "--all", "tags.deploy = 'gpu'", "--fp16", "--batch", "1:8:64")
    assert (outcome["status"], outcome["detail"]) == ("exists", "models:/p-trt/1")
    made = command("add-engine", "models:/p-trt/2", "--target", "sm80")
    assert [len(engine["compute_capabilities"]) for engine in made["engines"]] == [3, 1]

    measured = command("benchmark", "models:/p-trt/2", "--batch", "1,8", "--seconds", "0.02", "--log")
    assert {item.path for item in client.list_artifacts(measured["run_id"])} >= {"latency.png", "benchmark.json"}
    np.savez(tmp_path / "inputs.npz", x=networks.rows(5))
    compared = command(
        "compare", "models:/p/1", "models:/p-trt/1", "--data", tmp_path / "inputs.npz", "--seconds", "0.02"
    )
    assert compared["comparison"]["verdict"] == "passed"
    layers = command("inspect", "models:/p-trt/2", "--layers")["layers"]
    assert "MATRIX_MULTIPLY" in {layer["kind"] for layer in layers}

    found = client.search_model_versions("tags.`mlflow_trt.source` = 'models:/p/1'")
    assert {str(version.version) for version in found} == {"1", "2", "3"}
    (source,) = client.search_model_versions(
        "tags.`mlflow_trt.converted_to.p-trt.2` = 'models:/p-trt/2' and name = 'p'"
    )
    assert str(source.version) == "1"
