"""`mlflow-trt serve`, started for real, asked by clients that we did not write."""

from __future__ import annotations

import asyncio
import collections
import json
import subprocess

import mlflow
import networks
import numpy as np
import pytest
import requests
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from helpers import PATIENCE, opened_on_cpu, save_networks, wait_for
from prometheus_client.parser import text_string_to_metric_families
from servers import TensorServer
from triton_tensors import KNOWS_WHAT_NOTHING_IS, assert_same, inputs_of

import mlflow_trt
from examples.serving import running
from mlflow_trt.client import Client

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
ROWS = (0, 1, 3, 65)
MODELS = {
    "dtypes": (networks.every_dtype, networks.every_dtype_feeds),
    "ranks": (networks.ranks, networks.ranks_feeds),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_networks({name: network for name, (network, _) in MODELS.items()}, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(folders):
    server = TensorServer(*map(str, folders.values()), model_config=CPU, options=["--access-log"])
    with running(server):
        yield server


@pytest.fixture(scope="module")
def sessions(folders):
    with opened_on_cpu(folders) as sessions:
        yield sessions


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.address.removeprefix("http://")) as client:
        yield client


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MODELS)
class TestInference:
    def test_binary(self, name, rows, client, sessions):
        feeds = MODELS[name][1](rows)
        assert_same(client.infer(name, inputs_of(feeds)), sessions[name].run(feeds))

    def test_json(self, name, rows, client, sessions):
        feeds = MODELS[name][1](rows)
        outputs = [triton.InferRequestedOutput(spec.name, binary_data=False) for spec in sessions[name].outputs]
        answer = client.infer(name, inputs_of(feeds, binary=False), outputs=outputs)
        assert all("data" in output for output in answer.get_response()["outputs"])
        assert_same(answer, sessions[name].run(feeds))

    def test_some_of_both(self, name, rows, client, sessions):
        feeds = MODELS[name][1](rows)
        first, *_, last = (spec.name for spec in sessions[name].outputs)
        outputs = [
            triton.InferRequestedOutput(last, binary_data=True),
            triton.InferRequestedOutput(first, binary_data=False),
        ]
        answer = client.infer(
            name, inputs_of(feeds, binary=set(list(feeds)[1::2])), outputs=outputs, request_id="seven"
        )
        told = answer.get_response()
        assert told["id"] == "seven"
        assert [("data" in output) for output in told["outputs"]] == [False, True]
        assert_same(answer, sessions[name].run(feeds), {first, last})


@pytest.mark.parametrize("name", MODELS)
def test_many_at_once(name, server, sessions):
    """Requests that run together get their own rows; of floats the last bits depend on how many run together."""

    async def ask():
        async with triton_aio.InferenceServerClient(server.address.removeprefix("http://")) as client:
            feeds = [MODELS[name][1](rows) for rows in (*range(12), 65, 70) for _ in range(3)]
            answers = await asyncio.gather(*(client.infer(name, inputs_of(one, api=triton_aio)) for one in feeds))
            return list(zip(answers, feeds, strict=True))

    for answer, feeds in asyncio.run(ask()):
        for output, expected in sessions[name].run(feeds).items():
            found = answer.as_numpy(output)
            if found.size or KNOWS_WHAT_NOTHING_IS:
                assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert np.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_the_server_tells(client, sessions):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ranks")
    assert client.is_model_ready("ranks", "1")
    assert not client.is_model_ready("ranks", "2")
    assert not client.is_model_ready("other")
    about = client.get_server_metadata()
    assert about["name"] == "mlflow-trt"
    assert "binary_tensor_data" in about["extensions"]
    told = client.get_model_metadata("ranks")
    assert told["versions"] == ["1"]
    assert told["inputs"] == [
        {"name": "image", "datatype": "FP32", "shape": [-1, 2, 3]},
        {"name": "count", "datatype": "INT64", "shape": [-1]},
        {"name": "gain", "datatype": "FP32", "shape": [-1, 1]},
    ]
    assert [output["name"] for output in told["outputs"]] == [spec.name for spec in sessions["ranks"].outputs]
    assert {model["name"] for model in client.get_model_repository_index()} == set(MODELS)


def test_statistics_and_metrics(client, server):
    def counted():
        (told,) = client.get_inference_statistics("ranks", "1")["model_stats"]
        return told

    before = counted()
    for _ in range(3):
        client.infer("ranks", inputs_of(networks.ranks_feeds(5)))
    with pytest.raises(triton.InferenceServerException):
        client.infer("ranks", inputs_of({"image": np.zeros((1, 2, 3), np.float32)}))
    after = counted()
    assert after["inference_count"] - before["inference_count"] == 15
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 3
    assert after["inference_stats"]["fail"]["count"] - before["inference_stats"]["fail"]["count"] == 1
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    assert after["inference_stats"]["queue"]["count"] == after["inference_stats"]["compute_infer"]["count"]
    assert after["inference_stats"]["queue"]["ns"] > before["inference_stats"]["queue"]["ns"]
    sizes = {batch["batch_size"]: batch["compute_infer"]["count"] for batch in after["batch_stats"]}
    assert sizes[5] >= 3
    assert len(client.get_inference_statistics()["model_stats"]) == len(MODELS)

    text = requests.get(f"{server.address}/metrics", timeout=PATIENCE).text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[of_ranks("mlflow_trt_requests_total")] == after["inference_stats"]["success"]["count"]
    assert samples[of_ranks("mlflow_trt_failures_total", cause="bad_request")] >= 1
    count = samples[of_ranks("mlflow_trt_inference_seconds_count")]
    assert count == after["inference_stats"]["compute_infer"]["count"]
    assert samples[of_ranks("mlflow_trt_queue_seconds_count")] == count
    assert samples[of_ranks("mlflow_trt_runs_total", rows="5")] == sizes[5]
    assert samples[("mlflow_trt_requests_in_flight",)] == 0


def test_a_failure_is_counted_once(client, server):
    """As the model's, or as that of a request which came to none."""

    def failures():
        found = requests.get(f"{server.address}/metrics", timeout=PATIENCE).text
        families = {family.name: family for family in text_string_to_metric_families(found)}
        counted = {
            (sample.labels["model"], sample.labels["cause"]): sample.value
            for sample in families["mlflow_trt_failures"].samples
            if sample.name == "mlflow_trt_failures_total"
        }
        return collections.Counter(counted)

    before = failures()
    with pytest.raises(triton.InferenceServerException):
        client.infer("ranks", inputs_of({"image": np.zeros((1, 2, 3), np.float32)}))
    kind = {"Content-Type": "application/octet-stream"}
    answer = requests.post(f"{server.address}/invocations", data=b"x", headers=kind, timeout=PATIENCE)
    assert answer.status_code == 415
    assert "only supports the following content types" in answer.json()["error"]
    assert requests.get(f"{server.address}/v2/models/other", timeout=PATIENCE).status_code == 404
    grown = failures() - before  # what clients of other tests gave up may have come late
    assert [grown[model, "bad_request"] for model in ("ranks", "dtypes", "")] == [1, 1, 0]
    assert grown["", "not_found"] == 1


def of_ranks(metric, **labels):
    return (metric, *sorted({"model": "ranks", "version": "1", **labels}.items()))


def test_the_access_log(server, client):
    client.infer("ranks", inputs_of(networks.ranks_feeds(2)), headers={"X-Request-Id": "a-request"})
    with pytest.raises(triton.InferenceServerException):
        client.infer("unknown", inputs_of(networks.ranks_feeds(2)))
    wait_for(lambda: '"/v2/models/unknown/infer"' in server.log())  # which is written after the answer
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line.get("request") == "a-request")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v2/models/ranks/infer", 200)
    assert line["received"] > 0
    assert line["sent"] > 0
    (line,) = (line for line in lines if line["path"] == "/v2/models/unknown/infer")
    assert (line["status"], line["cause"]) == (404, "not_found")


def test_curl(server, sessions):
    x = networks.ranks_feeds(1)
    body = {
        "inputs": [
            {"name": "image", "datatype": "FP32", "shape": [1, 2, 3], "data": x["image"].tolist()},  # nested
            {"name": "count", "datatype": "INT64", "shape": [1], "data": x["count"].tolist()},
            {"name": "gain", "datatype": "FP32", "shape": [1, 1], "data": x["gain"].reshape(-1).tolist()},  # flat
        ]
    }
    command = [
        "curl",
        "--silent",
        "--fail-with-body",
        "--data",
        json.dumps(body),
        f"{server.address}/v2/models/ranks/infer",
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    expected = sessions["ranks"].run(x)
    for output in answer["outputs"]:
        assert np.array_equal(np.reshape(output["data"], output["shape"]), expected[output["name"]])


def test_mlflows_wire(server, sessions):
    """Our own client speaks it, as MLflow's do: the first model answers."""
    feeds = networks.every_dtype_feeds(3)
    body = {"inputs": {name: np.asarray(value).tolist() for name, value in feeds.items()}}
    answer = requests.post(f"{server.address}/invocations", json=body, timeout=PATIENCE)
    assert answer.status_code == 200
    expected = sessions["dtypes"].run(feeds)
    for name, value in answer.json()["predictions"].items():
        assert np.array_equal(np.asarray(value, expected[name].dtype), expected[name])
    assert requests.post(f"{server.address}/invocations", json={"rows": []}, timeout=PATIENCE).status_code == 400
    assert requests.post(f"{server.address}/invocations", data=b"x", timeout=PATIENCE).status_code == 415
    assert requests.get(f"{server.address}/ping", timeout=PATIENCE).ok
    assert requests.get(f"{server.address}/version", timeout=PATIENCE).text == mlflow.__version__
    with Client(server.address) as client:
        assert client.ping()


def test_rows_as_bytes(tmp_path):
    """Where the signature has binary columns, rows may come as BYTES, as uncompressed images do."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    signature = ModelSignature(inputs=Schema([ColSpec("binary", "image")]))
    mlflow_trt.save_model(networks.pixels(), tmp_path / "pixels", batch=(1, 4, 8), signature=signature, verify=False)
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 6, 3)).astype(np.uint8)
    cells = np.array([image.tobytes() for image in images], dtype=object)
    server = TensorServer(str(tmp_path / "pixels"), model_config=CPU)
    with running(server), triton.InferenceServerClient(server.address.removeprefix("http://")) as client:
        assert client.get_model_metadata("pixels")["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
        means = client.infer("pixels", inputs_of({"image": cells})).as_numpy("means")
        same = client.infer("pixels", inputs_of({"image": images})).as_numpy("means")
        with pytest.raises(triton.InferenceServerException, match="a cell of column 'image'|'image'"):
            client.infer("pixels", inputs_of({"image": np.array([b"12345"], dtype=object)}))
    assert np.allclose(means, images.mean((1, 2)), atol=1e-3)
    assert np.array_equal(means, same)
