"""`mlflow-trt serve --front-ends`, asked by clients that we did not write, and with front ends that end.

What such a server refuses, and how it ends, is in test_serve_failures.py, for both kinds of server.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import networks
import numpy as np
import pytest
import requests
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from helpers import PATIENCE, keep_asking, save_networks, wait_for
from processes import children_of, is_running
from servers import TensorServer
from tiers import exhaustive
from triton_tensors import assert_same, inputs_of

import mlflow_trt
from examples.serving import free_port, running
from mlflow_trt.client import Client
from mlflow_trt.deploy.serve.served_model import load_served_model
from mlflow_trt.deploy.serve.server import ServeOptions, serve
from mlflow_trt.errors import OptionError

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    return save_networks({"dtypes": networks.every_dtype, "product": networks.product}, at)


@pytest.fixture(scope="module")
def server(folder):
    server = TensorServer(
        *map(str, folder.values()), model_config=CPU, options=["--front-ends", "2", "--access-log"],
        environment={"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    with running(server):
        yield server


@pytest.fixture(scope="module")
def session(folder):
    with mlflow_trt.load_model(str(folder["dtypes"]), runtime="onnxruntime") as session:
        yield session


def netloc(server):
    return server.address.removeprefix("http://")


def front_ends_of(server):
    """The processes that the server started, the latest last."""
    return children_of(server.pid, running="front_ends")


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("rows", [0, 1, 3, 65, 5000])
def test_every_dtype(rows, binary, server, session):
    """Small requests go over the socket, large ones through memory."""
    feeds = networks.every_dtype_feeds(rows)
    outputs = [triton.InferRequestedOutput(spec.name, binary_data=binary) for spec in session.outputs]
    with triton.InferenceServerClient(netloc(server)) as client:
        answer = client.infer("dtypes", inputs_of(feeds, binary=binary), outputs=outputs)
    assert_same(answer, session.run(feeds))


def test_many_at_once_and_some_malformed(server, product_weights):
    """Through all front ends, whose requests run together."""
    sizes = [1, 3, 400, 3000, 12]

    async def ask(seed):
        x = networks.rows(sizes[seed % 5], seed=seed)
        async with triton_aio.InferenceServerClient(netloc(server)) as client:
            if seed % 10 == 7:
                with pytest.raises(triton_aio.InferenceServerException, match="'x'"):
                    await client.infer("product", inputs_of({"x": x[:, :5].copy()}, api=triton_aio))
                return
            for _ in range(3):
                answer = await client.infer("product", inputs_of({"x": x}, api=triton_aio))
                assert np.allclose(answer.as_numpy("y"), x @ product_weights, atol=1e-3)

    async def ask_all():
        await asyncio.gather(*[ask(seed) for seed in range(64)])

    asyncio.run(ask_all())
    assert len(front_ends_of(server)) == 2


def test_mlflows_wire_and_what_the_server_tells(server, session):
    feeds = networks.every_dtype_feeds(3)
    body = {"inputs": {name: np.asarray(value).tolist() for name, value in feeds.items()}}
    answer = requests.post(f"{server.address}/invocations", json=body, timeout=PATIENCE)
    expected = session.run(feeds)
    for name, value in answer.json()["predictions"].items():
        assert np.array_equal(np.asarray(value, expected[name].dtype), expected[name])
    assert requests.get(f"{server.address}/ping", timeout=PATIENCE).ok
    assert "mlflow_trt_requests_in_flight 0.0" in requests.get(f"{server.address}/metrics", timeout=PATIENCE).text
    requests.get(f"{server.address}/v2?x=1", headers={"X-Request-Id": "mine"}, timeout=PATIENCE)
    wait_for(lambda: '"mine"' in server.log())  # which is written after the answer
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line.get("request") == "mine")
    assert (line["client"], line["method"], line["path"], line["status"]) == ("127.0.0.1", "GET", "/v2", 200)


def test_a_front_end_that_is_killed(server, product_weights):
    """Its clients find another one, and it is replaced; nobody else notices."""
    before = front_ends_of(server)

    def ask(seed):
        x = networks.rows(200, seed=seed)
        with Client(server.address, model="product", retries=10, backoff=0.01) as client:  # a new connection each time
            return np.allclose(client.predict({"x": x})["y"], x @ product_weights, atol=1e-3)

    with keep_asking(ask, 4) as answered:
        wait_for(lambda: len(answered) > 20)
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: len(set(front_ends_of(server)) - set(before)) == 1)
        now = len(answered)
        wait_for(lambda: len(answered) > now + 40)
    assert all(answered)
    assert len(front_ends_of(server)) == 2
    assert "A front end ended with status -9; another one takes its place" in server.log()


@pytest.mark.parametrize("number", [signal.SIGKILL, *exhaustive(signal.SIGINT, signal.SIGTERM)])
def test_front_ends_end_with_their_server(number, folder):
    server = TensorServer(str(folder["product"]), model_config=CPU, options=["--front-ends", "2"])
    with running(server):
        started = front_ends_of(server)
        assert len(started) == 2
        os.kill(started[0], signal.SIGTERM)  # as a supervisor sends it to all processes of a group: not their business
        assert requests.get(f"{server.address}/v2/health/ready", timeout=PATIENCE).ok
        os.kill(server.pid, number)
        wait_for(lambda: server.has_ended and not any(map(is_running, started)))


def test_a_port_that_another_server_has(folder, monkeypatch):
    """Though front ends share one among them."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # as serve() does, and not undo
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve([str(folder["product"])], ServeOptions(port=port, front_ends=2), print)


def test_a_port_that_another_server_takes_while_models_are_loaded(folder, monkeypatch):
    """Both would have a part of the requests."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    port = free_port()
    with socket.socket() as other:

        def load(source, settings):
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                other.setsockopt(socket.SOL_SOCKET, option, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            return load_served_model(source, settings)

        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve([str(folder["product"])], ServeOptions(port=port, front_ends=2, settings=CPU), print, load)


def test_no_socket_has_the_number_of_a_standard_stream(monkeypatch):
    """Though whoever starts a server closed one; a front end would take it for its standard input."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    kept = os.dup(0)
    os.close(0)
    try:
        with pytest.raises(OptionError):
            serve([], ServeOptions(follow_aliases=1), print)
        assert os.path.samestat(os.fstat(0), Path(os.devnull).stat())
        with socket.socket() as later:
            assert later.fileno() > 2
    finally:
        os.dup2(kept, 0)
        os.close(kept)


@pytest.mark.parametrize("front_ends", [-1, 65])
def test_numbers_of_front_ends_that_make_no_sense(front_ends):
    with pytest.raises(OptionError, match=f"front_ends is {front_ends}; expected 0 to 64"):
        ServeOptions(front_ends=front_ends)
