"""`mlflow models serve` when things go wrong: it says what is wrong, and goes on."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import mlflow
import networks
import numpy as np
import pandas as pd
import pytest
import requests
from helpers import PATIENCE, wait_for
from servers import Server, served
from tiers import exhaustive

import mlflow_trt
from mlflow_trt.client import Client
from mlflow_trt.core import wire
from mlflow_trt.errors import InputError, OutOfMemoryError, ServerError, ServerTimeoutError

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
X = np.array([1, -2, 3], np.float32)
Y = np.array([3, 4, 9], np.float32)  # the largest product of each with any
CLIENTS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("square") / "model"
    mlflow_trt.save_model(networks.square(), folder, shapes={"x": ((1,), (4,), (8,))}, verify=False)
    return folder


@pytest.fixture(scope="module")
def server(folder, module_store):
    with served(str(folder), module_store.uri, CPU) as address:
        yield address


@pytest.fixture
def goes_on(server):
    """Whatever a test does to the server, it answers afterwards."""
    yield
    assert requests.get(f"{server}/ping", timeout=PATIENCE).ok
    with Client(server, retries=0) as client:
        assert np.array_equal(client.predict({"x": X})["y"], Y)


def post(server, body, content_type):
    response = requests.post(f"{server}/invocations", body, headers={"content-type": content_type}, timeout=PATIENCE)
    return response.status_code, response.text


def parquet(**columns):
    body = io.BytesIO()
    pd.DataFrame(columns).to_parquet(body)
    return body.getvalue()


@pytest.mark.usefixtures("goes_on")
class TestBadRequests:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"no parquet", "valid Parquet"),
            (b"", "valid Parquet"),
            (parquet(x=X)[:-20], "valid Parquet"),
            (parquet(y=X, z=X), "the DataFrame has no column 'x'"),
            (parquet(x=[[1.0], [2.0, 3.0]]), "the cells of column 'x' differ in shape"),
            (parquet(x=["a", "b"]), "column 'x', row 0"),
            (parquet(x=[[1.0], None]), "column 'x', row 1 is missing"),
        ],
        ids=["text", "nothing", "cut off", "other columns", "ragged", "texts", "a null"],
    )
    def test_malformed_parquet(self, body, message, server):
        status, answer = post(server, body, wire.PARQUET)
        assert status == 400
        assert re.search(message, answer)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"{", "valid JSON"),
            (b"\xff\xfe", "valid JSON"),
            (b"[1, 2]", "Received a list"),
            (b'{"x": [1]}', "exactly one of the input fields"),
            (b'{"inputs": {"x": [1, [2]]}}', "inhomogeneous|sequence"),
            (b'{"inputs": {"x": "one"}}', "input 'x' has 0 dimensions"),
            (b'{"inputs": {"x": 1}}', "input 'x' has 0 dimensions"),
        ],
    )
    def test_malformed_json(self, body, message, server):
        status, answer = post(server, body, wire.JSON)
        assert status == 400
        assert re.search(message, answer)

    def test_other_content_types(self, server):
        assert post(server, b"x", "application/octet-stream")[0] == 415

    def test_a_body_of_50_megabytes_that_is_none(self, server):
        status, _ = post(server, np.random.default_rng(0).bytes(50_000_000), wire.PARQUET)
        assert status == 400


@pytest.mark.usefixtures("goes_on")
class TestFailures:
    def test_what_does_not_fit_into_memory(self, server):
        million = {"x": np.full(1_000_000, 77.125, np.float32)}
        with Client(server, retries=0) as client, pytest.raises(OutOfMemoryError, match="Failed to allocate") as caught:
            client.predict(million)
        assert "run fewer rows" in caught.value.message
        request = wire.parquet_request(million)
        status, answer = post(server, request.content, request.content_type)
        assert status == 429
        # MLflow would quote the data before the reason.
        assert json.loads(answer)["message"].startswith("ONNX Runtime")
        assert "77.125" not in answer

    def test_a_client_that_goes_away_before_its_request_is_complete(self, server):
        for _ in range(20):
            with socket.create_connection((urlsplit(server).hostname, urlsplit(server).port)) as connection:
                connection.sendall(head(1000) + b"only the beginning")

    def test_a_client_that_goes_away_before_the_answer(self, server):
        body = wire.parquet_request({"x": np.ones(5000, np.float32)}).content
        for _ in range(20):
            with socket.create_connection((urlsplit(server).hostname, urlsplit(server).port)) as connection:
                connection.sendall(head(len(body)) + body)

    def test_200_clients_at_once(self, server):
        def predict(number):
            x = np.arange(number, number + 5, dtype=np.float32)
            with Client(server, retries=0) as client:
                barrier.wait()
                return np.array_equal(client.predict({"x": x})["y"], x * x[-1])

        barrier = threading.Barrier(CLIENTS, timeout=PATIENCE)
        with ThreadPoolExecutor(CLIENTS) as pool:
            assert all(pool.map(predict, range(CLIENTS)))


def head(length):
    return (
        f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.PARQUET}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


@pytest.mark.exhaustive
def test_a_runtime_that_fails(tmp_path, module_store):
    shapes = {"x": ((1, 16), (2, 16), (4, 16)), "shape": ((2, 1), (8, 4), (16, 16))}
    mlflow_trt.save_model(networks.reshaped(), tmp_path / "model", shapes=shapes, verify=False)
    x = networks.rows(2)
    with served(str(tmp_path / "model"), module_store.uri, CPU) as address, Client(address) as client:
        with pytest.raises(ServerError, match="the server answered 500: ONNX Runtime .* failed: .*Reshape") as caught:
            client.predict({"x": x, "shape": np.array([5, 7])})
        assert caught.value.status == 500
        assert client.ping()
        assert np.allclose(client.predict({"x": x, "shape": np.array([8, 4])})["y"], x.reshape(8, 4))


@pytest.mark.exhaustive
def test_a_server_that_is_killed_and_started_again(folder, module_store):
    first = Server(str(folder), module_store.uri, CPU)
    done = threading.Event()
    answers = []

    def keep_asking():
        with Client(first.address, retries=100, backoff=0.2) as client:
            while not done.is_set():
                answers.append(np.array_equal(client.predict({"x": X})["y"], Y))

    try:
        first.wait_until_ready()
        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(keep_asking) for _ in range(8)]
            wait_for(lambda: len(answers) > 50)
            first.kill()
            second = Server(str(folder), module_store.uri, CPU, port=first.port)
            try:
                second.wait_until_ready()
                before = len(answers)
                wait_for(lambda: len(answers) > before + 50)
            finally:
                done.set()
                for future in asking:
                    future.result()  # nobody noticed
                second.stop()
    finally:
        done.set()
        first.stop()
    assert all(answers)


@pytest.mark.parametrize("workers", [1, *exhaustive(2)])
def test_a_server_whose_gpu_is_lost(workers, tmp_path, module_store):
    """One worker ends, and so does the server; of several the others go on, and uvicorn starts another."""
    mlflow.pyfunc.save_model(tmp_path / "model", loader_module="failing", pip_requirements=[])
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}  # as pytest made it
    x = networks.rows(3)
    server = Server(str(tmp_path / "model"), module_store.uri, {}, workers=workers, environment=environment)
    try:
        server.wait_until_ready()
        with Client(server.address, retries=0) as client:
            expected = client.predict({"x": x})["y"]
            with pytest.raises(ServerError, match="500: CUDA failed: unspecified launch failure"):
                client.predict({"x": x + 1000})
        if workers == 1:
            wait_for(lambda: server.has_ended)
            assert "This server ends" in server.log()
        else:
            wait_for(lambda: server.log().count("Application startup complete") > workers)
            with Client(server.address, retries=5) as client:
                for _ in range(20):
                    assert np.allclose(client.predict({"x": x})["y"], expected)
    finally:
        server.stop()


@pytest.mark.exhaustive
def test_a_server_that_crashes_says_where(folder, module_store):
    server = Server(str(folder), module_store.uri, CPU)
    try:
        server.wait_until_ready()
        os.kill(int(re.search(r"Started server process \[(\d+)\]", server.log())[1]), signal.SIGSEGV)
        wait_for(lambda: server.has_ended)
        assert re.search(r"Fatal Python error: Segmentation fault(.|\n)*thread 0x", server.log())
    finally:
        server.stop()


@pytest.mark.exhaustive
def test_two_workers_and_a_limit(folder, module_store):
    """More requests at once than the server is told to take answer 503, which the client tries again."""
    environment = {"UVICORN_LIMIT_CONCURRENCY": "4", "MLFLOW_DISABLE_SCHEMA_DETAILS": "true"}
    with served(str(folder), module_store.uri, CPU, workers=2, environment=environment) as address:
        assert min(seconds_of_calls(address, 30)) < 0.030  # without TCP_NODELAY none takes less than 40 ms

        def predict(retries):
            with Client(address, retries=retries, backoff=0.05) as client:
                try:
                    return np.array_equal(client.predict({"x": X})["y"], Y)
                except ServerError as error:
                    return error.status or re.match("the server broke the connection off", error.message)[0]

        with ThreadPoolExecutor(40) as pool:
            answers = set(pool.map(predict, [0] * 200))
            # Uvicorn closes without reading the request, which now and then outruns its 503.
            assert answers - {"the server broke the connection off"} == {True, 503}
            assert set(pool.map(predict, [100] * 200)) == {True}
        with Client(address) as client, pytest.raises(InputError) as caught:
            client.predict({"x": np.full((3, 2), 77.125, np.float32)})
        assert "input 'x' has 2 dimensions, (3, 2); expected 1" in caught.value.message


def seconds_of_calls(address, count):
    """How long each of so many calls takes on one connection. The shortest does not depend on what else runs here."""
    body = json.dumps({"inputs": {"x": X.tolist()}})
    with requests.Session() as session:
        for _ in range(count):
            began = time.perf_counter()
            answer = session.post(f"{address}/invocations", body, headers={"content-type": wire.JSON}, timeout=PATIENCE)
            yield time.perf_counter() - began
            assert answer.ok


@pytest.mark.exhaustive
def test_an_answer_that_takes_longer_than_the_server_allows(folder, module_store):
    environment = {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "1"}
    with served(str(folder), module_store.uri, CPU, environment=environment) as address, Client(address) as client:
        with pytest.raises(ServerTimeoutError, match="the server gave up: Request processing time exceeded limit"):
            client.predict({"x": np.ones(30_000, np.float32)})
        assert client.ping()
