"""The target `mlflow-trt` of `mlflow deployments`: found by MLflow, started and asked by its commands and clients."""

from __future__ import annotations

import json
import os
import sys

import networks
import numpy as np
import pandas as pd
import pytest
from command_line import run
from mlflow.deployments import get_deploy_client, run_local
from mlflow.exceptions import MlflowException
from servers import ServerProcess

import mlflow_trt
from examples.serving import free_port, running
from mlflow_trt.deploy.deployments import parse_config
from mlflow_trt.errors import InputError, OptionError, ServerUnavailableError

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
KEY = "0123456789abcdef-key"


def mlflow(*arguments):
    return run("deployments", *arguments, program="mlflow", MLFLOW_TRT_API_KEY=KEY)


@pytest.fixture(scope="module")
def address(module_store, tmp_path_factory):
    """`mlflow deployments run-local`, of a registered model."""
    mlflow_trt.log_model(networks.ranks(), name="r", registered_model_name="r", batch=(1, 4, 8), verify=False)
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "deployments", "run-local", "--target", "mlflow-trt", "--name", "ranks"]
    command += ["--model-uri", "models:/r/1", "-C", f"port={port}", "-C", f"api_key_file={keys}"]
    command += ["-C", f"model_config={json.dumps(CPU)}", "-C", "requests=64"]
    address = f"http://127.0.0.1:{port}"
    server = ServerProcess(
        command, {**os.environ, "MLFLOW_TRACKING_URI": module_store.uri}, ready=f"{address}/v2/health/ready"
    )
    with running(server):
        yield address


@pytest.fixture
def client(address, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRT_API_KEY", KEY)
    return get_deploy_client(f"mlflow-trt:{address}")


@pytest.fixture(scope="module")
def expected(address):  # which registers the model
    del address
    with mlflow_trt.load_model("models:/r/1", runtime="onnxruntime") as session:
        yield session.run(networks.ranks_feeds(3))


@pytest.mark.parametrize("name", [None, "ranks", "ranks/1"])
def test_arrays(name, client, expected):
    found = client.predict(name, networks.ranks_feeds(3))["predictions"]
    assert found.keys() == expected.keys()
    for output, array in expected.items():
        assert found[output].dtype == array.dtype
        assert found[output].tobytes() == array.tobytes()


def frame(rows):
    feeds = networks.ranks_feeds(rows)
    columns = {name: list(array) if array.ndim > 1 else array for name, array in feeds.items()}
    return pd.DataFrame(columns, index=pd.Index(range(7, 7 + rows)))


@pytest.mark.parametrize("name", [None, "ranks"])
def test_frames(name, client, expected):
    """As `mlflow.pyfunc` predicts them, with their index."""
    answer = client.predict(endpoint=name, inputs=frame(3))
    found = answer["predictions"]
    assert found.index.tolist() == [7, 8, 9]
    assert np.array_equal(np.stack(found["scaled"]), expected["scaled"])
    assert np.array_equal(found["doubled"], expected["doubled"])
    told = json.loads(answer.to_json())["predictions"]
    assert np.allclose([row["total"] for row in told], expected["total"])


def test_what_the_server_has(client):
    assert [(model["name"], model["version"]) for model in client.list_deployments()] == [("ranks", "1")]
    assert [tensor["name"] for tensor in client.get_deployment("ranks")["inputs"]] == ["image", "count", "gain"]
    with pytest.raises(MlflowException, match="there is no model of that name") as caught:
        client.get_deployment("other")
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_errors(client, address, monkeypatch):
    with pytest.raises(InputError, match="input 'gain' is missing"):
        client.predict("ranks", {"image": networks.ranks_feeds(2)["image"], "count": np.ones(2, np.int64)})
    with pytest.raises(MlflowException, match="column.*'gain'"):
        client.predict("ranks", frame(2).drop(columns="gain"))
    for attempt in (
        lambda: client.create_deployment("a", "models:/a/1"),
        lambda: client.update_deployment("a"),
        lambda: client.delete_deployment("a"),
    ):
        with pytest.raises(MlflowException, match="decided where it is started"):
            attempt()
    monkeypatch.delenv("MLFLOW_TRT_API_KEY")
    with pytest.raises(MlflowException, match="401: the API key is missing or wrong"):
        get_deploy_client(f"mlflow-trt:{address}").list_deployments()
    with pytest.raises(ServerUnavailableError, match="no server answers"):
        get_deploy_client(f"mlflow-trt:http://127.0.0.1:{free_port()}").list_deployments()
    with pytest.raises(OptionError, match="expected an address like"):
        get_deploy_client("mlflow-trt")


def test_mlflows_commands(address, expected, tmp_path):
    frame(3).to_json(tmp_path / "input.json", orient="records")
    target = ["--target", f"mlflow-trt:{address}"]
    done = mlflow("predict", *target, "--name", "ranks", "--input-path", tmp_path / "input.json",
                  "--output-path", tmp_path / "output.json")  # fmt: skip
    assert done.code == 0, done.errors
    rows = json.loads((tmp_path / "output.json").read_text())["predictions"]
    assert np.allclose([row["scaled"] for row in rows], expected["scaled"], rtol=1e-6)
    assert "ranks" in mlflow("list", *target).output
    help_text = mlflow("help", "--target", "mlflow-trt").output
    assert "api_key_file" in help_text
    assert "model_config" in help_text


class TestConfig:
    def test_from_texts(self):
        given = {"port": "1", "access_log": "true", "follow_aliases": "2.5", "body_bytes": "7", "model_config": CPU}
        options = parse_config({**given, "ssl_keyfile": __file__, "ssl_certfile": __file__})
        assert (options.port, options.access_log, options.follow_aliases) == (1, True, 2.5)
        assert (options.limits.body_bytes, options.settings, str(options.ssl_keyfile)) == (7, CPU, __file__)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"prot": "1"}, "config has 'prot'; expected some of host, port"),
            ({"port": "one"}, "port is 'one': Input should be a valid integer"),
            ({"port": "70000"}, "port is 70000; expected 0 to 65535"),
            ({"model_config": "{"}, "config: model_config is '{': Invalid JSON"),
            ({"model_config": '{"runtim": 1}'}, "unknown load setting 'runtim'"),
            ({"limits": "1"}, "config has 'limits'"),
        ],
    )
    def test_what_makes_no_sense(self, config, message):
        with pytest.raises(OptionError, match=message):
            run_local("mlflow-trt", "p", "models:/p/1", config=config)

    def test_other_flavors(self):
        with pytest.raises(OptionError, match="flavor is 'onnx'; the target mlflow-trt serves mlflow_trt"):
            run_local("mlflow-trt", "p", "models:/p/1", flavor="onnx")
