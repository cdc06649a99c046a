"""Clients that ask a scoring server at the same time, as fast as it answers, and what they see.

They are threads in a few processes, and send bytes that were written beforehand: what is measured is the server.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO, cast
from urllib.parse import urlsplit

import numpy as np

from mlflow_trt.core.wire import Request

_TIMEOUT = 600.0


class Answer(NamedTuple):
    """When a request was sent and answered, in seconds of the clock that processes share, and whether it was well."""

    sent: float
    answered: float
    problem: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the clients saw. Latencies in milliseconds."""

    clients: int
    requests: int
    failures: int
    problem: str
    requests_per_second: float
    p50_ms: float
    p99_ms: float


def drive(address: str, requests: Request | Sequence[Request], clients: int, seconds: float) -> list[Answer]:
    """Ask with so many clients for so long, each again as soon as it has an answer.

    Each asks once before it counts. A request that was sent in time is waited for, so that slow servers have some.

    Args:
        address: of the server.
        requests: what all clients send, or the first, the second, ... of them, where they differ.
        clients: how many there are.
        seconds: how long they begin requests.
    """
    one_for_all = isinstance(requests, Request)
    processes = min(clients, max(1, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory() as folder:
        for index in range(1 if one_for_all else clients):
            Path(folder, str(index)).write_bytes(as_bytes(requests if one_for_all else requests[index], address))  # type: ignore[index, arg-type]
        shares = [
            [0 if one_for_all else index for index in range(start, clients, processes)] for start in range(processes)
        ]
        asking = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, address, folder, str(seconds), *map(str, share)],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for share in shares
        ]
        for process in asking:
            cast("TextIO", process.stdout).readline()  # all are warm
        for process in asking:
            cast("TextIO", process.stdin).write("go\n")
            cast("TextIO", process.stdin).flush()
        return [Answer(*answer) for process in asking for answer in json.loads(process.communicate()[0])]


def as_bytes(request: Request, address: str) -> bytes:
    """The request as it goes over the wire."""
    headers = {
        "host": urlsplit(address).netloc,
        "content-type": request.content_type,
        "content-length": str(len(request.content)),
        **request.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{request.method} {request.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content


def summarized(clients: int, rounds: Sequence[Sequence[Answer]]) -> Load:
    """What was seen in all rounds together.

    Requests per second are those answered well, over the time from the first sent to the last answered of each round.
    """
    answers = [answer for answered in rounds for answer in answered]
    good = [answer for answer in answers if not answer.problem]
    latencies = np.array([answer.answered - answer.sent for answer in good]) * 1e3
    elapsed = sum(max(answer.answered for answer in seen) - min(answer.sent for answer in seen) for seen in rounds)
    p50, p99 = np.percentile(latencies, [50, 99]) if good else (float("nan"),) * 2
    return Load(
        clients=clients,
        requests=len(good),
        failures=len(answers) - len(good),
        problem=next((answer.problem for answer in answers if answer.problem), ""),
        requests_per_second=len(good) / elapsed,
        p50_ms=float(p50),
        p99_ms=float(p99),
    )


class Connection:
    """The little of HTTP that a client needs whose requests are written already."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._place = (str(parts.hostname), int(parts.port or 80))
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer. Raises OSError where the connection breaks."""
        if self._socket is None:
            self._socket = socket.create_connection(self._place, timeout=_TIMEOUT)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected = self._socket
        connected.sendall(request)
        received = self._more(connected)
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._more(connected)
        head = received[:end].lower()
        _, _, length = head.partition(b"\r\ncontent-length:")
        size = int(length.split(b"\r\n", 1)[0])
        body = bytearray(received[end + 4 :])
        while len(body) < size:
            body += self._more(connected)
        if b"\r\nconnection: close" in head:
            self.close()
        return int(head.split(b" ", 2)[1]), bytes(body)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @staticmethod
    def _more(connected: socket.socket) -> bytes:
        chunk = connected.recv(1 << 20)
        if not chunk:
            raise ConnectionResetError("the server closed the connection")
        return chunk


def ask(address: str, requests: Sequence[bytes], seconds: float) -> list[Answer]:
    """What the clients of one process see, one for each request. They begin when a line comes in."""
    answers: list[Answer] = []
    warm = threading.Barrier(len(requests) + 1)
    go = threading.Barrier(len(requests) + 1)

    def client(request: bytes) -> None:
        connection = Connection(address)
        _ask(connection, request)
        connection.close()  # servers close what idles, and others may take a while to get warm
        warm.wait()
        go.wait()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answers.append(_ask(connection, request))
        connection.close()

    threads = [threading.Thread(target=client, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    warm.wait()
    sys.stdout.write("warm\n")
    sys.stdout.flush()
    sys.stdin.readline()
    go.wait()
    for thread in threads:
        thread.join()
    return answers


def _ask(connection: Connection, request: bytes) -> Answer:
    sent = time.monotonic()
    try:
        status, body = connection.ask(request)
        problem = "" if status == 200 else f"{status}: {body[-300:].decode(errors='replace')}"
    except (OSError, ValueError) as error:  # the latter for what is no HTTP
        connection.close()  # the next request opens it again
        problem = f"{type(error).__name__}: {error}"
    return Answer(sent, time.monotonic(), problem)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Clients for `python -m benchmarks.serving`, which starts them.")
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("requests", nargs="+", help="files in the folder, one for each client")
    options = parser.parse_args()
    contents = {name: (options.folder / name).read_bytes() for name in set(options.requests)}
    json.dump(ask(options.address, [contents[name] for name in options.requests], options.seconds), sys.stdout)
