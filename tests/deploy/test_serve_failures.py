"""`mlflow-trt serve` when things go wrong, and when it ends."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import networks
import numpy as np
import pytest
import requests
import tritonclient.http as triton
from command_line import run
from helpers import PATIENCE, wait_for
from repository import SUPPORT
from servers import ServerProcess, TensorServer
from tiers import exhaustive

from examples.serving import free_port, running
from mlflow_trt.deploy.serve.keys import read_keys
from mlflow_trt.deploy.serve.limits import Limits
from mlflow_trt.deploy.serve.server import ServeOptions, serve
from mlflow_trt.errors import ArtifactError, MissingDependencyError, OptionError, RuntimeUnavailableError

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
KEY = "0123456789abcdef-key"
CLIENTS = 64


@pytest.fixture(scope="module", params=[0, *exhaustive(2)], ids=["alone", "front ends"])
def front_ends(request):
    """How many processes speak HTTP for the server."""
    return request.param


@pytest.fixture(scope="module")
def server(product_folder, front_ends):
    options = ["--max-body-mib", "1", "--timeout", "20", "--front-ends", str(front_ends)]
    server = TensorServer(str(product_folder), model_config=CPU, options=options)
    with running(server):
        yield server


class Gated(ServerProcess):
    """The server of `gated_server`, and its gate."""

    def __init__(self, folder, drain_seconds, front_ends):
        self.folder = folder
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        script = SUPPORT / "gated_server.py"
        command = [sys.executable, str(script), str(folder), str(self.port), str(drain_seconds), str(front_ends)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # as pytest made it
        super().__init__(command, environment, ready=f"{self.address}/v2/health/ready")

    def has_one_waiting(self):
        return (self.folder / "waiting").exists()

    def open(self):
        (self.folder / "open").touch()

    def shut(self):
        for file in ("open", "waiting"):
            (self.folder / file).unlink(missing_ok=True)


@contextmanager
def gated(folder, front_ends, drain_seconds=0):
    server = Gated(folder, drain_seconds, front_ends)
    try:
        with running(server):
            yield server
    finally:
        server.open()


def connection(server):
    return closing(http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=PATIENCE))


def body_of(x, **parameters):
    tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
    body, length = triton.InferenceServerClient.generate_request_body([tensor], **parameters)
    return body, {"Inference-Header-Content-Length": str(length)}


def ask(over, body, headers, path="/v2/models/product/infer"):
    over.request("POST", path, body, headers)
    response = over.getresponse()
    return response.status, response.headers, response.read()


def outputs_of(headers, body):
    length = headers["Inference-Header-Content-Length"]
    answer = triton.InferenceServerClient.parse_response_body(body, header_length=length and int(length))
    return answer.as_numpy("y")


def infer(over, x, **parameters):
    status, headers, body = ask(over, *body_of(x, **parameters))
    return (status, outputs_of(headers, body)) if status == 200 else (status, json.loads(body)["error"])


@pytest.fixture
def goes_on(server, product_weights):
    """Whatever a test does to the server, it answers afterwards, and nothing is left in it."""
    yield
    x = networks.rows(3)
    with connection(server) as over:
        status, y = infer(over, x)
    assert status == 200
    assert np.allclose(y, x @ product_weights, atol=1e-4)
    wait_for(lambda: "mlflow_trt_requests_in_flight 0.0" in metrics(server))


@pytest.mark.usefixtures("goes_on")
class TestRefusals:
    def test_malformed_bodies_among_others(self, server, product_weights):
        """One in ten is malformed; the others get what is theirs, on the same connections."""
        good, refused = [], []

        def client(seed):
            chance = random.Random(seed)
            with connection(server) as over:
                for number in range(20):
                    x = networks.rows(chance.randint(1, 12), seed=1000 * seed + number)
                    body, headers = body_of(x)
                    if chance.random() < 0.1:
                        status, _, answer = ask(over, *malformed(chance, body, headers))
                        refused.append((status, "error" in json.loads(answer)))
                    else:
                        status, told, answer = ask(over, body, headers)
                        good.append(
                            status == 200 and np.allclose(outputs_of(told, answer), x @ product_weights, atol=1e-4)
                        )

        with ThreadPoolExecutor(CLIENTS) as pool:
            for asking in [pool.submit(client, seed) for seed in range(CLIENTS)]:
                asking.result()
        assert all(good)
        assert len(good) > 1000
        assert set(refused) == {(400, True)}
        assert len(refused) > 50

    @pytest.mark.parametrize("length", ["-1", "x", "", "9" * 30, "1.5", "0", "70000"])
    def test_header_lengths(self, length, server):
        body, _ = body_of(networks.rows(1))
        with connection(server) as over:
            status, _, answer = ask(over, body, {"Inference-Header-Content-Length": length})
        assert status == 400
        assert "inference-header-content-length" in json.loads(answer)["error"]

    def test_shapes_are_compared_with_the_model(self, server):
        with connection(server) as over:
            for shape in [(3,), (2, 15), (1, 16, 1)]:
                status, message = infer(over, np.full(shape, 77.125, np.float32))
                assert status == 400
                assert "input 'x'" in message
                assert "77.125" not in message
            assert infer(over, networks.rows(2))[0] == 200  # on the same connection

    def test_large_bodies(self, server):
        x = networks.rows(20_000)  # 1.2 MiB
        for headers in ({}, {"Expect": "100-continue"}, {"Transfer-Encoding": "chunked"}):
            body, told = body_of(x)
            chunks = [body[start : start + 65536] for start in range(0, len(body), 65536)]
            response = requests.post(
                f"{server.address}/v2/models/product/infer",
                iter(chunks) if "Transfer-Encoding" in headers else body,
                headers={**told, **headers} if "Transfer-Encoding" not in headers else told,
                timeout=PATIENCE,
            )
            assert response.status_code == 413
            assert "1048576 bytes" in response.json()["error"]

    def test_chunks_are_read(self, server, product_weights):
        x = networks.rows(1000)
        body, told = body_of(x)
        chunks = (body[start : start + 1000] for start in range(0, len(body), 1000))
        response = requests.post(f"{server.address}/v2/models/product/infer", chunks, headers=told, timeout=PATIENCE)
        assert response.status_code == 200
        assert np.allclose(outputs_of(response.headers, response.content), x @ product_weights, atol=1e-4)

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/", 404),
            ("GET", "/v2/models", 404),
            ("GET", "/v2/models/other", 404),
            ("POST", "/v2/models/product/versions/7/infer", 404),
            ("POST", "/v2/models/product/versions/1/generate", 404),
            ("GET", "/v2/models/product/infer", 405),
            ("POST", "/v2/models/product", 405),
            ("DELETE", "/v2/health/live", 405),
            ("GET", "/invocations", 405),
            ("HEAD", "/v2/models/product", 200),
            ("GET", "/v2/models/product/versions/1", 200),
        ],
    )
    def test_addresses(self, method, path, status, server):
        with connection(server) as over:
            over.request(method, path, b"x" if method == "POST" else None)
            response = over.getresponse()
            assert response.status == status
            response.read()
            over.request("GET", "/v2/health/live")
            assert over.getresponse().status == 200

    def test_compressed_bodies(self, server, product_weights):
        with connection(server) as over:
            status, _, answer = ask(over, b"x", {"Content-Encoding": "gzip"})
            assert status == 415
            assert "compressed" in json.loads(answer)["error"]
            body, headers = body_of(networks.rows(3))
            status, headers, answer = ask(over, body, {**headers, "Content-Encoding": "identity"})  # it is not
        assert status == 200
        assert np.allclose(outputs_of(headers, answer), networks.rows(3) @ product_weights, atol=1e-4)

    def test_garbage_instead_of_http(self, server):
        for garbage in (
            b"\0" * 100,
            b"GET\r\n\r\n",
            b"POST /v2/models/product/infer HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as raw:
                raw.sendall(garbage)
                assert raw.recv(100).startswith(b"HTTP/1.1 400")

    def test_clients_that_go_away_under_load(self, server, product_weights):
        """Some close before they have their answer, or in the middle of their request; the others notice nothing."""

        def polite(seed):
            x = networks.rows(5, seed=seed)
            with connection(server) as over:
                answers = [infer(over, x) for _ in range(20)]
            return all(status == 200 and np.allclose(y, x @ product_weights, atol=1e-4) for status, y in answers)

        def rude(seed):
            body, headers = body_of(networks.rows(100))
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            request = f"POST /v2/models/product/infer HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n"
            whole = request.encode() + body
            for number in range(20):
                with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as raw:
                    raw.sendall(whole if (seed + number) % 2 else whole[: len(whole) * number // 20])
            return True

        with ThreadPoolExecutor(32) as pool:
            asking = [pool.submit(rude if seed % 2 else polite, seed) for seed in range(32)]
            assert all(one.result() for one in asking)


def malformed(chance, body, headers):
    """A request that is none."""
    length = int(headers["Inference-Header-Content-Length"])
    return chance.choice(
        [
            (body[: length // 2], headers),
            (body[:-3], headers),
            (body + b"123", headers),
            (body, {"Inference-Header-Content-Length": str(length + 1)}),
            (body, {"Inference-Header-Content-Length": str(10**15)}),
            (body, {}),
            (body.replace(b"FP32", b"INT8"), headers),
            (body.replace(b'"x"', b'"X"'), headers),
            (chance.randbytes(300), headers),
        ]
    )


@pytest.fixture(scope="module")
def gate(tmp_path_factory, front_ends):
    with gated(tmp_path_factory.mktemp("gate"), front_ends) as server:
        yield server


WAITS = np.full((1, 16), -1, np.float32)


def metrics(server):
    return requests.get(f"{server.address}/metrics", timeout=PATIENCE).text


class TestWaiting:
    @pytest.fixture(autouse=True)
    def _shut(self, gate, product_weights):
        gate.shut()
        yield
        gate.open()
        x = networks.rows(2)
        with connection(gate) as over:
            status, y = infer(over, x)
        assert status == 200
        assert np.allclose(y, x @ product_weights, atol=1e-4)

    def test_deadlines(self, gate):
        """The request that waits is given up; its connection goes on."""
        with connection(gate) as over:
            status, message = infer(over, WAITS, timeout=200_000)  # microseconds
            assert status == 504
            assert "no answer in time" in message
            gate.open()
            assert infer(over, networks.rows(2))[0] == 200

    def test_more_requests_than_it_takes(self, gate):
        def one():
            with connection(gate) as over:
                return infer(over, WAITS)[0]

        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(one) for _ in range(3)]
            wait_for(lambda: "mlflow_trt_requests_in_flight 3.0" in metrics(gate))
            with connection(gate) as over:
                status, headers, answer = ask(over, *body_of(networks.rows(1)))
                assert status == 429
                assert headers["Retry-After"] == "1"
                assert "3 requests" in json.loads(answer)["error"]
                gate.open()
                assert [one.result() for one in waiting] == [200] * 3
                assert infer(over, networks.rows(1))[0] == 200

    def test_a_client_that_goes_away_while_it_waits(self, gate):
        with connection(gate) as over:
            over.request("POST", "/v2/models/product/infer", *body_of(WAITS))
            wait_for(gate.has_one_waiting)
        wait_for(lambda: 'cause="disconnected"' in metrics(gate))


class TestEnding:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
    def test_ending_while_one_waits(self, number, tmp_path, front_ends, product_weights):
        """The request that it has is answered before it ends, and no other is taken."""
        with gated(tmp_path, front_ends) as server, ThreadPoolExecutor(1) as pool, connection(server) as over:
            asking = pool.submit(infer, over, WAITS)
            wait_for(server.has_one_waiting)
            os.kill(server.pid, number)
            wait_for(lambda: not accepts(server))
            assert not server.has_ended
            server.open()
            status, y = asking.result()
            assert status == 200
            assert np.allclose(y, WAITS @ product_weights, atol=1e-4)
            wait_for(lambda: server.has_ended)

    def test_draining_under_load(self, tmp_path, front_ends, product_weights):
        """Until its time is over, a server that ends answers all, and asks clients to come again by another way."""
        answers, closing_answers = [], []
        ended = threading.Event()

        def client(seed):
            x = networks.rows(3, seed=seed)
            with connection(server) as over:
                while not ended.is_set():
                    try:
                        status, headers, body = ask(over, *body_of(x))
                    except ConnectionRefusedError:
                        return  # it has ended; no connection was open, so nothing was lost
                    answers.append(
                        status == 200 and np.allclose(outputs_of(headers, body), x @ product_weights, atol=1e-4)
                    )
                    if headers["Connection"] == "close":
                        closing_answers.append(True)
                        over.close()
                        if len(closing_answers) > 100:
                            return  # as a balancer does that asked whether it is ready

        with gated(tmp_path, front_ends, 2) as server, ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(client, seed) for seed in range(3)]
            wait_for(lambda: len(answers) > 50)
            os.kill(server.pid, signal.SIGTERM)
            wait_for(lambda: requests.get(f"{server.address}/v2/health/ready", timeout=PATIENCE).status_code == 503)
            assert requests.get(f"{server.address}/v2/health/live", timeout=PATIENCE).ok
            for one in asking:
                one.result()
            wait_for(lambda: server.has_ended)
        assert all(answers)
        assert len(closing_answers) > 100

    def test_a_lost_gpu(self, tmp_path, front_ends):
        with gated(tmp_path, front_ends) as server:
            with connection(server) as over:
                status, message = infer(over, np.full((1, 16), 1000, np.float32))
            assert status == 500
            assert "unspecified launch failure" in message
            wait_for(lambda: server.has_ended)
            assert "This server ends, for another process to begin anew" in server.log()
            assert server._process.returncode != 0


def accepts(server):
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


def test_api_keys(product_folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"# two keys\nanother-key-{'x' * 20}\n{KEY}\n")
    server = TensorServer(str(product_folder), model_config=CPU, options=["--api-key-file", str(keys), "--access-log"])
    with running(server), connection(server) as over:
        body, headers = body_of(networks.rows(1))
        for wrong in (
            {},
            {"X-API-Key": KEY[:-1]},
            {"Authorization": KEY},
            {"Authorization": "Bearer "},
            {"X-API-Key": ""},
        ):
            status, told, answer = ask(over, body, {**headers, **wrong})
            assert (status, told["WWW-Authenticate"]) == (401, "Bearer")
            assert "API key" in json.loads(answer)["error"]
        for right in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"}):
            assert ask(over, body, {**headers, **right})[0] == 200
        for path in ("/v2/health/live", "/v2/health/ready", "/ping"):
            assert requests.get(f"{server.address}{path}", timeout=PATIENCE).ok
        assert requests.get(f"{server.address}/metrics", timeout=PATIENCE).status_code == 401
        assert KEY not in server.log()


@pytest.mark.parametrize(
    ("content", "message"), [("", "has none"), ("short\n", "is no key"), ("# 0123456789abcdef0123\n", "has none")]
)
def test_files_of_keys_that_make_no_sense(content, message, tmp_path):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(OptionError, match=message):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "port is 70000; expected 0 to 65535"),
        ({"drain_seconds": -1}, "drain_seconds is -1; expected seconds, 0 or more"),
        ({"settings": {"runtim": 1}}, "unknown load setting 'runtim'"),
        ({"ssl_keyfile": Path(__file__)}, "give both of ssl_keyfile and ssl_certfile"),
        ({"ssl_ca_certs": Path(__file__)}, "ssl_ca_certs is for HTTPS"),
        ({"ssl_keyfile": Path("nowhere"), "ssl_certfile": Path("nowhere")}, "ssl_keyfile: nowhere is no file"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        ServeOptions(**options)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 0}, "seconds is 0; expected a number above 0"),
        ({"seconds": float("inf")}, "seconds is inf; expected a number above 0"),
        ({"seconds": float("nan")}, "seconds is nan; expected a number above 0"),
        ({"pending_bytes": 1}, "one body may have 268435456"),
    ],
)
def test_limits_that_make_no_sense(limits, message):
    with pytest.raises(OptionError, match=message):
        Limits(**limits)


class TestStarting:
    @pytest.fixture(autouse=True)
    def _as_in_a_process_of_its_own(self, monkeypatch):
        monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")

    def fails(self, error, message, *models, **options):
        with pytest.raises(error, match=message):
            serve(
                [str(model) for model in models], ServeOptions(port=0, **{"settings": CPU, **options}), lambda _: None
            )

    def test_a_port_that_is_taken(self, product_folder):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
                serve([str(product_folder)], ServeOptions(port=port, settings=CPU), lambda _: None)

    def test_models_that_are_none(self, product_folder, tmp_path, store):
        mlflow.pyfunc.save_model(tmp_path / "other", loader_module="failing", pip_requirements=[])
        self.fails(ArtifactError, "other", tmp_path / "other")
        self.fails(mlflow.MlflowException, "none", "models:/none/1")
        self.fails(OptionError, "another version tomorrow", "models:/none/latest")
        self.fails(OptionError, "product, version 1 is there twice", product_folder, product_folder)

    def test_what_is_missing(self, product_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.asgi", None)
        self.fails(OptionError, "follows models like models:/NAME@ALIAS", product_folder, follow_aliases=5)
        self.fails(
            MissingDependencyError, "opentelemetry-instrumentation-asgi is not installed", product_folder, tracing=True
        )

    def test_without_a_gpu_nothing_starts_silently_on_the_cpu(self, product_folder, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        self.fails(RuntimeUnavailableError, "start the server with --model-config", product_folder, settings={})


@pytest.mark.parametrize(
    ("option", "value", "code", "words"),
    [
        ("--device", "first", 2, "--device: 'first': expected a number"),
        ("--timeout", "inf", 2, "'--timeout': inf: expected a number of seconds above 0"),
        ("--max-requests", "0", 2, "'--max-requests'"),
        ("--max-pending-mib", "1", 1, "--max-pending-mib is 1048576, and one body may have 268435456"),
    ],
)
def test_from_the_command_line(option, value, code, words, product_folder):
    found, _, errors = run("serve", product_folder, option, value)
    assert found == code
    assert words in " ".join(errors.split())
