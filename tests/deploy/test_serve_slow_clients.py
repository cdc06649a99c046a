"""`mlflow-trt serve` with clients that take their answers slowly or never, and that never end the head of a request."""

from __future__ import annotations

import asyncio
import functools
import http.client
import io
import itertools
import json
import logging
import socket
import time
from pathlib import Path

import networks
import numpy as np
import onnxruntime
import pytest
from helpers import PATIENCE, save_networks, wait_for
from servers import TensorServer

from examples.serving import running
from mlflow_trt.client import Client
from mlflow_trt.deploy.serve.access_log import AccessLog
from mlflow_trt.deploy.serve.http import Exchange
from mlflow_trt.deploy.serve.limits import Deadline
from mlflow_trt.deploy.serve.uvicorn_config import in_pieces

ROWS, WIDTH = 200, 20_000


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose answer fills what the kernel keeps for a connection, many times."""
    make = functools.partial(networks.product, outputs=WIDTH)
    return save_networks({"wide": make}, tmp_path_factory.mktemp("models"))["wide"]


@pytest.fixture(scope="module", params=[0, 2], ids=["alone", "front ends"])
def slow_server(request, wide):
    options = ["--timeout", "4", "--front-ends", str(request.param)]
    server = TensorServer(str(wide), model_config={"runtime": "onnxruntime"}, options=options)
    with running(server):
        yield server


def connected(server, received=None):
    """A connection, which keeps this many bytes that were not read."""
    over = socket.socket()
    over.settimeout(PATIENCE)
    if received is not None:
        over.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received)
    over.connect(("127.0.0.1", server.port))
    return over


def ask(over, x):
    """Send a request for all that the model makes of these rows."""
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    head = (
        "POST /v2/models/wide/infer HTTP/1.1\r\nHost: tests\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + x.nbytes}\r\n\r\n"
    )
    over.sendall(head.encode() + header + x.tobytes())


def response_of(over):
    response = http.client.HTTPResponse(over)
    response.begin()
    return response


def send(over, data):
    """Whether it could be sent."""
    try:
        over.sendall(data)
    except ConnectionError:
        return False
    return True


def is_held_by_the_server(over):
    """Whether the kernel still has the other end: it says nothing to a client without room when it gives up."""
    theirs, ours = (f":{address[1]:04X}" for address in (over.getpeername(), over.getsockname()))
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(local.endswith(theirs) and remote.endswith(ours) for _, local, remote, *_ in connections)


@pytest.mark.server
class TestServer:
    def test_a_client_that_takes_its_answer_in_small_bites(self, slow_server, wide):
        """While others are answered between the bites."""
        x = networks.rows(ROWS)
        expected = onnxruntime.InferenceSession(wide / "model.onnx").run(None, {"x": x})[0]
        answer = b""
        with connected(slow_server, 4096) as over, Client(slow_server.address) as other:
            ask(over, x)
            response = response_of(over)
            while bite := response.read(1 << 20):
                answer += bite
                row = len(answer) % ROWS
                assert np.allclose(other.predict({"x": x[row : row + 1]})["y"], expected[row], atol=1e-4)
        found = np.frombuffer(answer[-ROWS * WIDTH * 4 :], np.float32).reshape(ROWS, WIDTH)
        assert np.allclose(found, expected, atol=1e-4)

    def test_clients_that_keep_a_connection_for_nothing(self, slow_server, wide):
        """Nothing is read of the answer; no head comes, half a head, half of a second one. All lose it."""
        x = networks.rows(ROWS)
        with (
            connected(slow_server, 4096) as never_reads,
            connected(slow_server) as silent,
            connected(slow_server) as begun,
            connected(slow_server) as second,
        ):
            ask(never_reads, x)
            assert is_held_by_the_server(never_reads)
            begun.sendall(b"GET /v2 HTTP/1.1\r\nHost: te")
            second.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: tests\r\n\r\nGET /v2 HTTP/1.1\r\nHost: te")
            assert response_of(second).read() == b'{"live":true}'
            for over in (silent, begun, second):
                assert over.recv(1 << 16) == b""
            wait_for(lambda: not is_held_by_the_server(never_reads))
        with Client(slow_server.address) as client:
            expected = onnxruntime.InferenceSession(wide / "model.onnx").run(None, {"x": x})[0]
            assert np.allclose(client.predict({"x": x})["y"], expected, atol=1e-4)

    def test_a_head_without_an_end(self, slow_server):
        with connected(slow_server) as over:
            over.sendall(b"GET /v2 HTTP/1.1\r\nHost: tests\r\nX-Long: ")
            sent = itertools.takewhile(functools.partial(send, over), itertools.repeat(b"x" * (1 << 16)))
            assert sum(map(len, sent)) < 1 << 30  # most of it waited in the kernel

    def test_a_long_head_and_a_body_before_it(self, slow_server):
        """What came before a head counts for nothing, and 60,000 bytes are no fault."""
        x = networks.rows(ROWS)
        with connected(slow_server) as over:
            ask(over, x[:1])
            over.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: tests\r\nX-Long: " + b"x" * 60_000 + b"\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"live":true}'):
                received = over.recv(1 << 20)
                assert received
                answer += received
        assert answer.count(b"HTTP/1.1 200 OK") == 2


class TestPieces:
    @pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 18) + 1, 1_000_003])
    def test_each_goes_when_those_before_it_were_taken(self, size):
        body = np.random.default_rng(size).bytes(size)
        taken, may_go = [], asyncio.Semaphore(0)

        async def app(_scope, _receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})

        async def send(message):
            taken.append(message)
            await may_go.acquire()

        async def go():
            answering = asyncio.ensure_future(in_pieces(app)({}, None, send))
            await asyncio.sleep(0)
            while not answering.done():
                before = len(taken)
                may_go.release()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert len(taken) - before <= 1
            await answering

        asyncio.run(go())
        start, *pieces = taken
        assert start["status"] == 200
        assert b"".join(piece["body"] for piece in pieces) == body
        assert [bool(piece.get("more_body")) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        assert all(len(piece["body"]) <= 1 << 18 for piece in pieces)

    def test_a_deadline_that_has_ended_cuts_nothing_off(self):
        async def answer():
            loop = asyncio.get_running_loop()
            with Deadline(loop, 0) as deadline:
                deadline.end()
                passed = loop.create_future()
                loop.call_later(0.001, passed.set_result, True)  # later than the deadline would have been
                return await passed

        assert asyncio.run(answer())


class Disk(io.StringIO):
    """Where lines are written to as long as there is room."""

    is_full = False

    def write(self, text):
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_an_access_log_that_cannot_be_written(messages):
    """It is said once, each time; requests are answered all the same."""
    disk = Disk()
    log = AccessLog(disk)

    def write(path):
        scope = {"method": "GET", "path": path, "headers": [], "client": None}
        log.write(Exchange(scope, None, None), time.monotonic(), "")

    write("/1")
    for path in ("/2", "/3"):
        disk.is_full = True
        write(path)
        write(path)
        disk.is_full = False
        write(f"{path}-later")
    assert [json.loads(line)["path"] for line in disk.getvalue().splitlines()] == ["/1", "/2-later", "/3-later"]
    said = [record for record in messages.records if "The access log cannot be written" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING] * 2
