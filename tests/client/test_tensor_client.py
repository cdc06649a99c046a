"""The client and servers of the Open Inference Protocol: the same face as for MLflow's server, and the same errors."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import ml_dtypes
import networks
import numpy as np
import pytest
from helpers import opened_on_cpu, save_networks, wait_for
from servers import TensorServer

from examples.serving import running
from mlflow_trt.client import AsyncClient, Client
from mlflow_trt.core import tensor_wire, wire
from mlflow_trt.errors import (
    InputDtypeError,
    InputError,
    InputShapeError,
    OptionError,
    OutOfMemoryError,
    ServerError,
    ServerTimeoutError,
)

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
MODELS = {
    "dtypes": (networks.every_dtype, networks.every_dtype_feeds),
    "ranks": (networks.ranks, networks.ranks_feeds),
    "pixels": (networks.pixels, None),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_networks({name: network for name, (network, _) in MODELS.items()}, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(folders):
    server = TensorServer(
        *map(str, folders.values()), model_config=CPU, options=["--access-log", "--max-body-mib", "1"]
    )
    with running(server):
        yield server


@pytest.fixture(scope="module")
def sessions(folders):
    with opened_on_cpu(folders) as sessions:
        yield sessions


def same(outputs, expected):
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        assert outputs[name].dtype == array.dtype, name
        assert outputs[name].shape == array.shape, name
        assert outputs[name].tobytes() == array.tobytes(), name
        assert outputs[name].flags.writeable, name


def asked(server, client):
    """The paths of the requests of a client that says who it is: the log is written after the answer."""
    lines = (json.loads(line) for line in server.log().splitlines() if line.startswith("{"))
    return [line["path"] for line in lines if line.get("request") == client]


class TestOurServer:
    @pytest.mark.parametrize("rows", [0, 1, 3, 65])
    @pytest.mark.parametrize("name", ["dtypes", "ranks"])
    def test_every_dtype_bit_for_bit(self, name, rows, server, sessions):
        feeds = MODELS[name][1](rows)
        with Client(server.address, model=name) as client:
            same(client.predict(feeds), sessions[name].run(feeds))

    def test_what_goes_over_the_wire(self, server):
        """The model is asked for once, and then there is one request for each call."""
        with Client(server.address, headers={"X-Request-Id": "one"}) as client:
            for rows in (2, 3):
                client.predict(networks.every_dtype_feeds(rows))
        paths = ["/v2", "/v2/repository/index", "/v2/models/dtypes", *["/v2/models/dtypes/infer"] * 2]
        wait_for(lambda: len(asked(server, "one")) >= len(paths))
        assert asked(server, "one") == paths

    def test_lists_numbers_and_other_dtypes(self, server, sessions):
        feeds = networks.ranks_feeds(3)
        expected = sessions["ranks"].run(feeds)
        with Client(server.address, model="ranks/1") as client:
            same(client.predict({name: array.tolist() for name, array in feeds.items()}), expected)
            same(client.predict({**feeds, "count": feeds["count"].astype(np.float64)}), expected)
            same(client.predict({**feeds, "count": feeds["count"].astype(np.int8)}), expected)
            same(client.predict({**feeds, "image": feeds["image"].astype(">f4")}), expected)
            exact = {**feeds, "image": feeds["image"].astype(ml_dtypes.bfloat16)}
            same(client.predict(exact), sessions["ranks"].run(exact))
        feeds = networks.every_dtype_feeds(2)
        with Client(server.address) as client:  # the first model answers, as by MLflow's wire
            same(client.predict({**feeds, "scale": 2.5}), sessions["dtypes"].run(feeds))

    def test_rows_as_bytes(self, server, sessions):
        images = np.random.default_rng(0).integers(0, 255, (3, 8, 6, 3)).astype(np.uint8)
        with Client(server.address, model="pixels") as client:
            same(
                client.predict({"image": [image.tobytes() for image in images]}),
                sessions["pixels"].run({"image": images}),
            )
            with pytest.raises(InputError, match=r"column 'image' have the shape \(5,\), .*; expected \(8, 6, 3\)"):
                client.predict({"image": [b"short"] * 2})

    def test_dtypes_of_outputs(self, server, sessions):
        feeds = networks.ranks_feeds(3)
        with Client(server.address, model="ranks", output_dtypes={"sums": "float64"}) as client:
            outputs = client.predict(feeds)
        assert outputs["sums"].dtype == np.float64
        assert outputs["total"].dtype == np.float32
        assert np.array_equal(outputs["sums"], sessions["ranks"].run(feeds)["sums"])

    def test_threads_and_asyncio(self, server, sessions):
        feeds = [networks.ranks_feeds(rows) for rows in range(1, 13)]
        expected = [sessions["ranks"].run(one)["sums"] for one in feeds]
        with Client(server.address, model="ranks") as client, ThreadPoolExecutor(6) as pool:
            found = list(pool.map(client.predict, feeds))

        async def ask():
            async with AsyncClient(server.address, model="ranks") as client:
                assert await client.ping()
                return await asyncio.gather(*map(client.predict, feeds))

        for outputs in (found, asyncio.run(ask())):
            assert all(np.allclose(one["sums"], sums, rtol=1e-5) for one, sums in zip(outputs, expected, strict=True))

    def test_what_the_model_does_not_want(self, server):
        feeds = networks.ranks_feeds(2)
        with Client(server.address, model="ranks") as client:
            with pytest.raises(InputError, match="input 'gain' is missing; the model wants image: float32"):
                client.predict({"image": feeds["image"], "count": feeds["count"]})
            with pytest.raises(InputError, match="there is no input 'other'"):
                client.predict({**feeds, "other": feeds["gain"]})
            for image in (feeds["image"][:, :, :2], feeds["image"].swapaxes(1, 2), feeds["image"].reshape(2, 6)):
                with pytest.raises(InputShapeError, match=r"'image' has the shape .*wants \(-1, 2, 3\)"):
                    client.predict({**feeds, "image": image})
            for count, what in (
                (np.array([1.5, 2]), r"'count', row 0: the value at \[0\] is no whole number"),
                (np.array([1, np.nan]), r"'count', row 1: the value at \[1\] is missing or infinite"),
                (["a", "b"], "'count' is of dtype <U1; expected int64"),
                (np.ma.masked_array([1, 2], [False, True]), r"'count', row 1: the value at \[1\] is missing"),
            ):
                with pytest.raises(InputDtypeError, match=what):
                    client.predict({**feeds, "count": count})
            with pytest.raises(InputDtypeError, match=r"'image', row 0: the value at \[0, 0, 0\] is too large"):
                client.predict({**feeds, "image": np.full((2, 2, 3), 1e300)})
            with pytest.raises(InputShapeError, match="input 'count' is no regular array"):
                client.predict({**feeds, "count": [[1], [2, 3]]})
            with pytest.raises(InputError, match="1048576 bytes"):
                client.predict({name: np.repeat(array, 20_000, 0) for name, array in feeds.items()})
            client.predict(feeds)

    @pytest.mark.parametrize("wire_format", ["parquet", "json"])
    def test_mlflows_wire_where_it_is_asked_for(self, wire_format, server):
        feeds = networks.every_dtype_feeds(3)
        del feeds["scale"]  # which fits no table
        with (
            Client(server.address, wire_format=wire_format, headers={"X-Request-Id": wire_format}) as client,
            pytest.raises(InputError, match="input 'scale' is missing|has no column 'scale'"),
        ):
            client.predict(feeds)
        wait_for(lambda: asked(server, wire_format))
        assert set(asked(server, wire_format)) == {"/invocations"}

    def test_models_that_are_not_there(self, server):
        with (
            Client(server.address, model="other") as client,
            pytest.raises(ServerError, match="404: there is no model"),
        ):
            client.predict({"x": np.zeros(1)})
        for options in ({"model": "/"}, {"model": "x", "wire_format": "json"}):
            with pytest.raises(OptionError, match="model is .*; expected NAME or NAME/VERSION"):
                Client(server.address, **options)

    def test_a_client_does_not_load_mlflow(self, server):
        program = f"""
import sys, numpy as np
from mlflow_trt.client import Client
with Client({server.address!r}, model="ranks") as client:
    client.predict({{"image": np.ones((2, 2, 3)), "count": np.ones(2, np.int8), "gain": [[1.0], [2.0]]}})
print("mlflow" in sys.modules)
"""
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "False"


class Answers:
    """A server that answers by method and path, and what it was asked; answers may be changed while it runs."""

    def __init__(self, answers):
        self.by_address = answers
        self.asked = []


@contextmanager
def answering(answers):
    told = Answers(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # the body is written after the headers

        def answer(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            told.asked.append((self.command, self.path))
            answer = told.by_address.get((self.command, self.path), (404, {}, b"nothing"))
            if callable(answer):
                answer = answer(self.headers, body)
            status, headers, content = answer
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer  # noqa: N815  # http.server's names

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=[0.02])  # seconds between looks whether it is to end
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def described(name="x", datatype="FP32", shape=(-1, 2)):
    return (200, {}, json.dumps({"inputs": [{"name": name, "datatype": datatype, "shape": shape}]}).encode())


def doubling(headers, body):
    """Twice the input, as JSON, whatever its type."""
    length = int(headers[tensor_wire.HEADER_LENGTH])
    (tensor,) = json.loads(body[:length])["inputs"]
    x = np.frombuffer(body[length:], {"FP32": np.float32, "INT64": np.int64}[tensor["datatype"]])
    output = {**tensor, "name": "y", "parameters": {}, "data": (2 * x).tolist()}
    return (200, {}, json.dumps({"outputs": [output]}).encode())


def protocol(**changes):
    return {
        ("GET", "/v2"): (200, {}, b'{"name": "triton", "extensions": ["binary_tensor_data"]}'),
        ("POST", "/v2/repository/index"): (200, {}, b'[{"name": "m"}]'),
        ("GET", "/v2/models/m"): described(),
        ("POST", "/v2/models/m/infer"): doubling,
        **changes,
    }


X = {"x": np.array([[1.5, -2]], np.float32)}
MLFLOW = {("POST", "/invocations"): (200, {}, b'{"predictions": {"y": [[3.0, -4.0]]}}')}


class TestOtherServers:
    def test_answers_as_json(self):
        with answering(protocol()) as (address, _), Client(address) as client:
            y = client.predict(X)["y"]
        assert (y.dtype, y.tolist()) == (np.float32, [[3, -4]])

    def test_answers_as_text(self):
        """BYTES, as JSON and as bytes; other servers have such models."""
        tensor = {"name": "y", "datatype": "BYTES", "shape": [2]}
        header = json.dumps({"outputs": [{**tensor, "parameters": {"binary_data_size": 10}}]}).encode()
        binary = (200, {tensor_wire.HEADER_LENGTH: str(len(header))}, header + b"\1\0\0\0a\1\0\0\0b")
        for answer in ((200, {}, json.dumps({"outputs": [{**tensor, "data": ["a", "b"]}]}).encode()), binary):
            infer = {("POST", "/v2/models/m/infer"): answer}
            with answering(protocol() | infer) as (address, _), Client(address) as client:
                assert client.predict(X)["y"].tolist() == [b"a", b"b"]

    @pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"outputs": [{"name": "y"}]}', b'{"outputs": 5}'])
    def test_answers_that_are_none(self, answer):
        infer = {("POST", "/v2/models/m/infer"): (200, {}, answer)}
        with (
            answering(protocol() | infer) as (address, _),
            Client(address) as client,
            pytest.raises(ServerError, match="the answer is none of the Open Inference Protocol"),
        ):
            client.predict(X)

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(400, InputError), (413, InputError), (429, OutOfMemoryError), (500, ServerError), (504, ServerTimeoutError)],
    )
    def test_errors_by_status(self, status, kind):
        infer = {("POST", "/v2/models/m/infer"): (status, {}, b'{"error": "that is why"}')}
        with (
            answering(protocol() | infer) as (address, _),
            Client(address, retries=0) as client,
            pytest.raises(kind, match=": that is why") as caught,
        ):
            client.predict(X)
        assert type(caught.value) is kind

    def test_a_server_that_is_busy_when_it_is_asked_what_it_is(self):
        busy = {("GET", "/v2"): (503, {}, b"busy")}
        with answering(busy) as (address, told), Client(address, retries=1, backoff=0.01) as client:
            with pytest.raises(ServerError, match="503: busy"):
                client.predict(X)
            assert told.asked == [("GET", "/v2")] * 2
            told.by_address = protocol()
            assert client.predict(X)["y"].tolist() == [[3, -4]]

    def test_several_models(self):
        index = {("POST", "/v2/repository/index"): (200, {}, b'[{"name": "m"}, {"name": "n"}]')}
        with answering(protocol() | index) as (address, _):
            with Client(address) as client, pytest.raises(OptionError, match="name one with model=: m, n"):
                client.predict(X)
            with Client(address, model="m") as client:
                assert client.predict(X)["y"].tolist() == [[3, -4]]

    def test_mlflows_server_is_asked_once_what_it_is(self):
        with answering(MLFLOW) as (address, told), Client(address, wire_format="auto") as client:
            for _ in range(2):
                assert client.predict({"x": X["x"].tolist()})["y"].tolist() == [[3, -4]]
        assert told.asked == [("GET", "/v2"), *[("POST", "/invocations")] * 2]

    def test_a_server_that_does_not_say_what_it_is_is_asked_again(self):
        """A proxy that knows nobody by that name yet; and then the server behind it speaks the protocol."""
        forbidden = {("GET", "/v2"): (403, {}, b"no")}
        with answering(MLFLOW | forbidden) as (address, told), Client(address) as client:
            client.predict({"x": X["x"].tolist()})
            told.by_address = protocol()
            assert client.predict(X)["y"].tolist() == [[3, -4]]

    @pytest.mark.parametrize("extensions", [b'{"name": "other"}', b'{"extensions": ["statistics"]}', b"[]"])
    def test_servers_without_binary_tensors(self, extensions):
        with answering(MLFLOW | {("GET", "/v2"): (200, {}, extensions)}) as (address, _):
            with Client(address) as client:
                assert client.predict({"x": X["x"].tolist()})["y"].tolist() == [[3, -4]]
            for options in ({"wire_format": "v2"}, {"model": "m"}):
                with Client(address, **options) as client, pytest.raises(ServerError, match="does not speak"):
                    client.predict(X)

    def test_a_model_that_became_another_one(self):
        """Other types, other shapes: the client looks again before it refuses anything, or believes a refusal."""
        with answering(protocol()) as (address, told), Client(address) as client:
            assert client.predict(X)["y"].dtype == np.float32
            told.by_address |= {("GET", "/v2/models/m"): described(shape=[-1, 3])}
            assert client.predict({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2, 2, 2]]
            refused = (400, {}, b'{"error": "x is INT64 now"}')
            told.by_address |= {
                ("GET", "/v2/models/m"): described(datatype="INT64", shape=[-1, 3]),
                ("POST", "/v2/models/m/infer"): lambda headers, body: (
                    refused if b"FP32" in body else doubling(headers, body)
                ),
            }
            assert client.predict({"x": np.ones((1, 3), np.float32)})["y"].dtype == np.int64

    def test_a_server_that_became_mlflows(self):
        with answering(protocol()) as (address, told), Client(address) as client:
            client.predict(X)
            told.by_address = MLFLOW
            assert client.predict({"x": X["x"].tolist()})["y"].tolist() == [[3, -4]]

    def test_names_are_quoted(self):
        assert tensor_wire.model_request("a b/3").path == "/v2/models/a%20b/versions/3"
        assert tensor_wire.model_request("a?b").path == "/v2/models/a%3Fb"

    def test_descriptions_that_are_none(self):
        for body in (b"[]", b'{"inputs": [{"name": "x"}]}', b"x"):
            with pytest.raises(ServerError, match="would describe a model"):
                tensor_wire.described_model("m", body)
        with pytest.raises(ServerError, match="does not tell which models"):
            tensor_wire.default_model(b"{}", "triton")
        assert isinstance(wire.error_of(408, b'{"error": "late"}'), ServerTimeoutError)
