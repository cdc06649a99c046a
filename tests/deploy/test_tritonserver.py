"""Models exported for Triton, on a real tritonserver: run by our backend, and every config.pbtxt read."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import networks
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from engines import tensorrt_engine, with_engines
from helpers import opened_on_cpu, save_networks
from tiers import exhaustive
from triton_server import TritonServer
from triton_tensors import assert_same
from tritonclient.utils import np_to_triton_dtype

import mlflow_trt
from examples.serving import running
from mlflow_trt.client import AsyncClient, Client
from mlflow_trt.deploy.triton import export_triton
from mlflow_trt.errors import InputError, OptionError, UnsupportedModelError

pytestmark = [pytest.mark.server, pytest.mark.slow]

CPU = {"runtime": "onnxruntime"}
ROWS = (0, 1, 3, 65)
MODELS = {
    "dtypes": (networks.every_dtype, networks.every_dtype_feeds),
    "ranks": (networks.ranks, networks.ranks_feeds),
}
APIS = {"http": triton_http, "grpc": triton_grpc}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_networks({name: network for name, (network, _) in MODELS.items()}, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sessions(folders):
    with opened_on_cpu(folders) as sessions:
        yield sessions


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    for name, folder in folders.items():
        export_triton(str(folder), repository, name=name, backend="mlflow_trt", model_config=CPU)
    server = TritonServer(repository, tmp_path_factory.mktemp("triton"), [])
    with running(server):
        yield server


@pytest.fixture(params=APIS)
def api(request):
    return APIS[request.param]


@pytest.fixture
def client(server, api):
    with api.InferenceServerClient(server.http if api is triton_http else server.grpc) as client:
        yield client


def shaped(feeds):
    """Triton has no tensors without dimensions."""
    return {name: np.atleast_1d(array) for name, array in feeds.items()}


def tensors(feeds, api):
    inputs = []
    for name, array in feeds.items():
        inputs.append(api.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return inputs


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_every_dtype_bit_for_bit(name, rows, client, api, sessions):
    feeds = MODELS[name][1](rows)
    assert_same(client.infer(name, tensors(shaped(feeds), api)), sessions[name].run(feeds))


@pytest.mark.parametrize("name", ["ranks", *exhaustive("dtypes")])
def test_our_client(name, server, sessions):
    """Which asks Triton as it asks our own server; many at once, and each gets its own rows."""
    feeds = [shaped(MODELS[name][1](rows)) for rows in (*range(12), 65) for _ in range(3)]
    expected = [sessions[name].run({**one, **({"scale": one["scale"][0]} if "scale" in one else {})}) for one in feeds]
    with Client(f"http://{server.http}", model=name) as client, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(client.predict, feeds))

    async def ask():
        async with AsyncClient(f"http://{server.http}", model=name) as client:
            return await asyncio.gather(*map(client.predict, feeds))

    for answers in (found, asyncio.run(ask())):
        for outputs, wanted in zip(answers, expected, strict=True):
            for output, array in wanted.items():
                assert (outputs[output].dtype, outputs[output].shape) == (array.dtype, array.shape)
                assert np.allclose(outputs[output], array, rtol=1e-5, atol=1e-6)


def test_requests_run_together(server, sessions):
    """Triton hands over the next request while others run, so the session can put them together."""
    with triton_http.InferenceServerClient(server.http, concurrency=32) as client:
        before = client.get_inference_statistics("ranks")["model_stats"][0]["execution_count"]
        pending = [
            client.async_infer("ranks", tensors(networks.ranks_feeds(1 + rows % 3), triton_http)) for rows in range(200)
        ]
        for rows, answer in enumerate(pending):
            expected = sessions["ranks"].run(networks.ranks_feeds(1 + rows % 3))
            assert np.allclose(answer.get_result().as_numpy("total"), expected["total"], rtol=1e-5, atol=1e-6)
        after = client.get_inference_statistics("ranks")["model_stats"][0]["execution_count"]
    assert after - before == 200


def test_what_is_asked_for(client, api, sessions):
    feeds = networks.ranks_feeds(3)
    answer = client.infer("ranks", tensors(feeds, api), outputs=[api.InferRequestedOutput("total")])
    assert_same(answer, {"total": sessions["ranks"].run(feeds)["total"]})
    assert answer.as_numpy("sums") is None


def test_errors(client, api, server, sessions):
    feeds = networks.ranks_feeds(3)
    error = triton_http.InferenceServerException
    with pytest.raises(error, match="the model calls both 'batch', so they must be equal"):
        client.infer("ranks", tensors({**feeds, "gain": feeds["gain"][:2]}, api))
    with pytest.raises(error, match="'image'"):
        client.infer("ranks", tensors({**feeds, "image": feeds["image"][:, :1]}, api))
    with Client(f"http://{server.http}", model="ranks") as ours, pytest.raises(InputError, match="must be equal"):
        ours.predict({**feeds, "gain": feeds["gain"][:2]})
    assert_same(client.infer("ranks", tensors(feeds, api)), sessions["ranks"].run(feeds))


def test_what_the_log_says(server):
    assert re.search(r"ranks: ONNX Runtime .* CPU", server.log())


@pytest.mark.exhaustive
def test_every_config_is_read(folders, tmp_path):
    """Of all backends: Triton reads and checks a config before it looks for the backend, which is not there."""
    repository = tmp_path / "models"
    saved = {
        "text": (networks.transformer(), {"shapes": [
            {"input_ids": ((1, 4), (4, 8), (8, 16))}, {"input_ids": ((1, 16), (2, 32), (4, 64))},
        ]}),
        "scalar": (networks.scaled_by_a_scalar(), {"shapes": {"x": ((1, 1), (4, 4), (8, 8))}}),
        "reshaped": (networks.reshaped(), {
            "shapes": {"x": ((2, 16), (4, 16), (8, 16)), "shape": ((2, 1), (16, 4), (64, 16))},
        }),
        "static": (networks.product(), {"batch": 8}),
    }  # fmt: skip
    for name, (model, recipe) in saved.items():
        mlflow_trt.save_model(model, tmp_path / name, verify=False, **recipe)
    ours = set(saved)
    for name in ours:
        export_triton(str(tmp_path / name), repository, name=f"{name}-onnx", backend="onnxruntime")
        export_triton(str(tmp_path / name), repository, name=f"{name}-ours", backend="mlflow_trt", model_config=CPU)
    for name, folder in folders.items():
        export_triton(str(folder), repository, name=f"{name}-onnx", backend="onnxruntime")
    for name in ours - {"scalar"}:
        uri = with_engines(tmp_path / name, tensorrt_engine(), tensorrt_engine("sm90"))
        export_triton(uri, repository, name=f"{name}-plan", instances=2)
    broken = repository / "broken"
    (broken / "1").mkdir(parents=True)
    (broken / "config.pbtxt").write_text((repository / "static-plan" / "config.pbtxt").read_text() + "max_batch: 3\n")
    options = ["--model-control-mode=explicit", "--strict-readiness=false"]
    server = TritonServer(repository, tmp_path / "triton", options)
    with running(server), triton_http.InferenceServerClient(server.http, network_timeout=120) as client:
        for name in sorted(path.name for path in repository.iterdir()):
            if name.endswith("-ours"):
                client.load_model(name)
                continue
            backend = "onnxruntime" if name.endswith("-onnx") else "tensorrt"
            told = f"unable to find backend library for backend '{backend}'"
            with pytest.raises(triton_http.InferenceServerException, match=told if name != "broken" else "failed to"):
                client.load_model(name)
        x = networks.rows(3, 5)
        answer = client.infer("scalar-ours", tensors({"x": x, "k": np.array([2.5], np.float32)}, triton_http))
        assert np.array_equal(answer.as_numpy("y"), x * np.float32(2.5))


def test_what_is_written(folders, tmp_path):
    made = export_triton(str(folders["ranks"]), tmp_path, name="ranks", backend="mlflow_trt", instances=2)
    version = Path(made.path) / "1"
    mlflow_trt.load_model(str(version), runtime="onnxruntime").close()  # it is an MLflow model
    assert (version / "model.py").is_file()
    assert "KIND_GPU" in (made.path / "config.pbtxt").read_text()
    with pytest.raises(OptionError, match="model_config is for backend='mlflow_trt'"):
        export_triton(str(folders["ranks"]), tmp_path, name="other", backend="onnxruntime", model_config=CPU)
    with pytest.raises(OptionError, match="unknown load setting 'runtim'"):
        export_triton(str(folders["ranks"]), tmp_path, name="o", backend="mlflow_trt", model_config={"runtim": 1})
    mlflow_trt.save_model(networks.bfloat16_product(), tmp_path / "b", batch=(1, 4, 8), verify=False)
    with pytest.raises(UnsupportedModelError, match="'x' is of dtype bfloat16, which Triton's Python backend"):
        export_triton(str(tmp_path / "b"), tmp_path, name="brain", backend="mlflow_trt")
    assert {path.name for path in tmp_path.iterdir()} == {"ranks", "b"}
