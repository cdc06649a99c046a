"""`mlflow-trt serve` with HTTPS, several processes on one port, and tracing; and asked by KServe's client."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys

import networks
import numpy as np
import pytest
import requests
import tritonclient.http as triton
import uvloop
from helpers import PATIENCE, keep_asking, save_networks, wait_for
from installed import installed
from repository import SUPPORT
from servers import ServerProcess, TensorServer
from uvicorn.server import ServerState

import mlflow_trt
from examples.serving import free_port, running
from mlflow_trt.client import Client
from mlflow_trt.deploy.serve import connection
from mlflow_trt.deploy.serve.uvicorn_config import uvicorn_config
from mlflow_trt.errors import ServerUnavailableError

pytestmark = pytest.mark.server

CPU = {"runtime": "onnxruntime"}
PASSWORD = "a password"


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and what it signed for the server, whose key has a password, and for a client."""
    at = tmp_path_factory.mktemp("certificates")
    subject = ["-subj", "/CN=mlflow-trt"]
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", at / "ca.key", "-out", at / "ca.pem",
            "-subj", "/CN=tests", "-days", 2)  # fmt: skip
    (at / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for who, secret in (("server", ["-passout", f"pass:{PASSWORD}"]), ("client", ["-nodes"])):
        key, wish = at / f"{who}.key", at / f"{who}.csr"
        openssl("req", "-newkey", "rsa:2048", *secret, "-keyout", key, "-out", wish, *subject)
        openssl("x509", "-req", "-in", wish, "-CA", at / "ca.pem", "-CAkey", at / "ca.key", "-CAcreateserial",
                "-out", at / f"{who}.pem", "-days", 2, "-extfile", at / "names")  # fmt: skip
    return at


class TestHttps:
    def server(self, folder, certificates, *more):
        options = [
            "--ssl-keyfile",
            str(certificates / "server.key"),
            "--ssl-certfile",
            str(certificates / "server.pem"),
        ]
        server = TensorServer(
            str(folder), model_config=CPU, options=[*options, *more],
            environment={"MLFLOW_TRT_SSL_KEYFILE_PASSWORD": PASSWORD},
        )  # fmt: skip
        server.address = server.address.replace("http", "https")
        server._ready = server._ready.replace("http", "https")
        return server

    @pytest.fixture(autouse=True)
    def _known_authority(self, certificates, monkeypatch):
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(name, str(certificates / "ca.pem"))

    def test_a_server_with_a_certificate(self, product_folder, certificates, product_weights, monkeypatch):
        x = networks.rows(3)
        server = self.server(product_folder, certificates)
        with running(server):
            with Client(server.address) as client:
                assert np.allclose(client.predict({"x": x})["y"], x @ product_weights, atol=1e-4)
            with pytest.raises(requests.ConnectionError):
                requests.get(server.address.replace("https", "http"), timeout=10)
            monkeypatch.delenv("SSL_CERT_FILE")  # nobody that it knows signed it
            with (
                Client(server.address, retries=0) as client,
                pytest.raises(ServerUnavailableError, match="CERTIFICATE"),
            ):
                client.predict({"x": x})

    @pytest.mark.parametrize("front_ends", ["0", "2"])
    def test_clients_with_a_certificate(self, front_ends, product_folder, certificates, product_weights):
        """Who brings none is not answered, probes neither."""
        options = ["--ssl-ca-certs", str(certificates / "ca.pem"), "--front-ends", front_ends]
        server = self.server(product_folder, certificates, *options)
        try:
            wait_for(lambda: "Serving at https" in server.log())
            theirs = (str(certificates / "client.pem"), str(certificates / "client.key"))
            assert requests.get(f"{server.address}/v2/health/ready", cert=theirs, timeout=30).ok
            x = networks.rows(70_000)  # both ways in many pieces
            tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
            body, length = triton.InferenceServerClient.generate_request_body([tensor])
            headers = {"Inference-Header-Content-Length": str(length)}
            url = f"{server.address}/v2/models/product/infer"
            answer = requests.post(url, body, headers=headers, cert=theirs, timeout=30)
            assert np.allclose(np.frombuffer(answer.content[-70_000 * 32 :], np.float32).reshape(-1, 8),
                               x @ product_weights, atol=1e-3)  # fmt: skip
            with pytest.raises(requests.ConnectionError):
                requests.get(f"{server.address}/v2/health/ready", timeout=30)
        finally:
            server.stop()

    def test_a_client_that_is_idle_does_not_hold_up_the_end(self, certificates, monkeypatch):
        """It reads nothing, so it does not say that it closes, too, for which TLS would wait."""
        monkeypatch.setattr(connection, "_FAREWELL", 0.01)
        theirs = ssl.create_default_context(cafile=certificates / "ca.pem")
        ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ours.load_cert_chain(certificates / "server.pem", certificates / "server.key", PASSWORD)

        async def app(_scope, _receive, send):
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

        def ask(port):
            client = theirs.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1")
            client.sendall(b"GET / HTTP/1.1\r\nHost: tests\r\n\r\n")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 204")
            return client

        async def end():
            loop, state = asyncio.get_running_loop(), ServerState()
            config = uvicorn_config(app, PATIENCE, {})
            config.load()
            arguments = {"config": config, "server_state": state, "app_state": {}}
            make = functools.partial(connection.Connection, head_seconds=PATIENCE, **arguments)
            server = await loop.create_server(make, "127.0.0.1", 0, ssl=ours, ssl_shutdown_timeout=10 * PATIENCE)
            client = await loop.run_in_executor(None, ask, server.sockets[0].getsockname()[1])
            (idle,) = state.connections
            idle.shutdown()
            await loop.run_in_executor(None, wait_for, lambda: not state.connections)
            client.close()
            server.close()

        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(end())
        finally:
            loop.close()


def test_two_processes_on_one_port(product_folder, product_weights):
    """As for two GPUs: the kernel shares out connections, and when one is killed, its clients find the other."""
    first = TensorServer(str(product_folder), model_config=CPU, options=["--reuse-port", "--access-log"])
    second = TensorServer(
        str(product_folder), model_config=CPU, options=["--reuse-port", "--access-log", "--port", str(first.port)]
    )

    def ask(seed):
        x = networks.rows(3, seed=seed)
        with Client(first.address, retries=5, backoff=0.01) as client:  # a new connection each time
            return np.allclose(client.predict({"x": x})["y"], x @ product_weights, atol=1e-4)

    def has_answered(server):
        return "/v2/models/product/infer" in server.log()

    with running(first):
        try:
            wait_for(lambda: "Serving at" in second.log())
            with keep_asking(ask, 4) as answered:
                wait_for(lambda: has_answered(first) and has_answered(second))
                os.kill(second.pid, signal.SIGKILL)
                before = len(answered)
                wait_for(lambda: len(answered) > before + 20)
        finally:
            second.stop()
    assert all(answered)


@pytest.mark.exhaustive
def test_a_port_that_is_not_shared(product_folder):
    with socket_on_port() as port:
        command = [
            sys.executable,
            "-m",
            "mlflow_trt",
            "serve",
            str(product_folder),
            "--port",
            str(port),
            "--reuse-port",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def socket_on_port():
    import contextlib

    @contextlib.contextmanager
    def taken():
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            one.listen()
            yield one.getsockname()[1]

    return taken()


@pytest.mark.parametrize("front_ends", [0, 1])
def test_tracing(front_ends, product_folder, tmp_path, product_weights):
    """A span for each request, in the trace that the client began; none for probes and metrics.

    The names of the model and of the host have those of probes in them.
    """
    pytest.importorskip("opentelemetry.instrumentation.asgi")
    port = free_port()
    script = SUPPORT / "traced_server.py"
    command = [sys.executable, str(script), f"shipping={product_folder}", str(port), str(tmp_path / "spans")]
    command.append(str(front_ends))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = ServerProcess(command, environment, ready=f"http://127.0.0.1:{port}/v2/health/ready")
    trace = "0af7651916cd43dd8448eb211c80319c"
    x = networks.rows(3)
    with running(server):
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "host": "metrics.test"}
        with Client(server.address, headers=headers) as client:
            assert np.allclose(client.predict({"x": x})["y"], x @ product_weights, atol=1e-4)
        assert requests.get(f"{server.address}/metrics", timeout=10).ok
        assert requests.get(f"{server.address}/v2/models/other", timeout=10).status_code == 404
    spans = [json.loads(line) for line in (tmp_path / "spans").read_text().splitlines()]
    served = [span for span in spans if span["kind"] == "SpanKind.SERVER"]
    paths = [span["attributes"].get("http.target", span["attributes"].get("url.path")) for span in served]
    assert "/v2/models/shipping/infer" in paths
    assert "/v2/models/other" in paths
    assert not {"/metrics", "/v2/health/ready"} & set(paths)
    (span,) = (span for span, path in zip(served, paths, strict=True) if path == "/v2/models/shipping/infer")
    assert span["context"]["trace_id"] == f"0x{trace}"


MODELS = {
    "dtypes": (networks.every_dtype, networks.every_dtype_feeds),
    "ranks": (networks.ranks, networks.ranks_feeds),
}


@pytest.fixture(scope="module")
def kserve(tmp_path_factory):
    """KServe's client, and a server with the models."""
    packages = installed("kserve", "kserve==0.21.0")
    folders = save_networks({name: network for name, (network, _) in MODELS.items()}, tmp_path_factory.mktemp("models"))
    server = TensorServer(*map(str, folders.values()), model_config=CPU)
    with running(server):
        yield packages, server.address, folders


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "json"])
@pytest.mark.parametrize("name", MODELS)
def test_kserves_client(name, kind, kserve, tmp_path):
    """InferenceRESTClient: every dtype that it can send, and 0, 1, 3 and 65 rows, bit for bit."""
    packages, address, folders = kserve
    files, expected = [], []
    with mlflow_trt.load_model(str(folders[name]), runtime="onnxruntime") as session:
        for rows in (0, 1, 3, 65):
            feeds = MODELS[name][1](rows)
            np.savez(tmp_path / f"feeds-{rows}.npz", **feeds)
            files += [str(tmp_path / f"feeds-{rows}.npz"), str(tmp_path / f"outputs-{rows}.npz")]
            expected.append(session.run(feeds))
    script = SUPPORT / "kserve_asks.py"
    done = subprocess.run(
        [sys.executable, "-S", str(script), address, name, kind, *files],  # without the packages of the tests
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for file, wanted in zip(files[1::2], expected, strict=True):
        found = np.load(file)
        for output, array in wanted.items():
            assert found[output].dtype == array.dtype, output
            assert found[output].reshape(array.shape).tobytes() == array.tobytes(), output
