"""Clients that ask a scoring server at the same time, as fast as it answers, and what they see.

They are threads in a few processes, and use nothing but the standard library: what is measured is the server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
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


def drive(address: str, request: Request, clients: int, seconds: float) -> list[Answer]:
    """Ask with so many clients for so long, each again as soon as it has an answer.

    Each asks once before it counts. A request that was sent in time is waited for, so that slow servers have some.
    """
    processes = min(clients, max(1, (os.cpu_count() or 1) // 2))
    shares = [clients // processes + (index < clients % processes) for index in range(processes)]
    with tempfile.NamedTemporaryFile() as body:
        body.write(request.content)
        body.flush()
        asking = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, address, body.name, request.content_type, str(share), str(seconds)],
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


def ask(address: str, request: Request, clients: int, seconds: float) -> list[Answer]:
    """What the clients of one process see. They begin when a line comes in."""
    answers: list[Answer] = []
    warm = threading.Barrier(clients + 1)
    go = threading.Barrier(clients + 1)

    def client() -> None:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=_TIMEOUT)
        _ask(connection, request)
        connection.close()  # servers close what idles, and others may take a while to get warm
        warm.wait()
        go.wait()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answers.append(_ask(connection, request))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
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


def _ask(connection: http.client.HTTPConnection, request: Request) -> Answer:
    sent = time.monotonic()
    try:
        connection.request("POST", "/invocations", request.content, {"Content-Type": request.content_type})
        response = connection.getresponse()
        body = response.read()
        problem = "" if response.status == http.client.OK else f"{response.status}: {body[-300:].decode()}"
    except (OSError, http.client.HTTPException) as error:
        connection.close()  # the next request opens it again
        problem = f"{type(error).__name__}: {error}"
    return Answer(sent, time.monotonic(), problem)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Clients of `python -m benchmarks.serving`, which starts them.")
    parser.add_argument("address")
    parser.add_argument("body", type=Path)
    parser.add_argument("content_type")
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    options = parser.parse_args()
    content = Request(content=options.body.read_bytes(), content_type=options.content_type)
    json.dump(ask(options.address, content, options.clients, options.seconds), sys.stdout)
