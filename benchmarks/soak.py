"""Mixed load on `mlflow-trt serve`: no request may fail or be answered wrongly, and no memory may grow."""

from __future__ import annotations

import contextlib
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
from rich.console import Console

import mlflow_trt
from benchmarks.load import Connection, as_bytes
from benchmarks.served import NAME, Arrays, nothing, resident_bytes, save
from examples.serving import ServerProcess, TensorServer, running
from mlflow_trt.client import Client
from mlflow_trt.core import tensor_wire
from mlflow_trt.errors import InputError

Ask = Callable[[random.Random], None]
_SIZES = (0, 1, 2, 3, 8, 20, 65)
_SAMPLES = 60
_LEAST_GROWTH = 16 << 20
"""What a heap moves by itself: less than so much growth is none."""


class Soak:
    """What happened so far."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.resident: list[int] = []
        self.ends = threading.Event()
        self._lock = threading.Lock()

    def run(self, name: str, ask: Ask, seed: int) -> None:
        """Ask until the end, and count."""
        chance = random.Random(seed)  # noqa: S311  # no secret
        while not self.ends.is_set():
            try:
                ask(chance)
                problem = None
            except Exception as error:  # noqa: BLE001  # whatever it is, it is counted
                problem = f"{name}: {type(error).__name__}: {error}"
            with self._lock:
                self.counts[name] += 1
                if problem is not None:
                    self.problems.append(problem)


def soak(seconds: float, console: Console) -> bool:
    """Run it, and print what was found; whether all was well."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlflow-trt-"))) / NAME
        save(nothing((3, 64, 64), 100), folder, {"batch": (1, 8, 64)})
        with mlflow_trt.load_model(str(folder), runtime="onnxruntime") as session:
            cases = {rows: _case(session, rows) for rows in _SIZES}
        server = TensorServer(f"{NAME}={folder}", model_config={"runtime": "onnxruntime"}, options=["--timeout", "30"])
        stack.enter_context(running(server))
        state = Soak(server)
        _load(state, Askers(server.address, cases, stack), seconds)
    return _report(state, seconds, console)


def _case(session: mlflow_trt.Session, rows: int) -> tuple[Arrays, Arrays]:
    feeds: Arrays = {"x": np.random.default_rng(rows).standard_normal((rows, 3, 64, 64)).astype(np.float32)}
    return feeds, session.run(feeds)


class Askers:
    """What is asked, each by several threads: answers compared, refusals expected, connections broken off."""

    def __init__(self, address: str, cases: dict[int, tuple[Arrays, Arrays]], stack: contextlib.ExitStack) -> None:
        self._address = address
        self._cases = cases
        self._binary = stack.enter_context(Client(address))
        self._parquet = stack.enter_context(Client(address, wire_format="parquet", output_dtypes={"y": "float32"}))
        self._listed = stack.enter_context(Client(address, wire_format="json", output_dtypes={"y": "float32"}))
        described = requests.get(f"{address}/v2/models/{NAME}", timeout=60).content
        self._model = tensor_wire.described_model(NAME, described)
        self.kinds: dict[str, tuple[int, Ask]] = {
            "binary tensors": (8, lambda chance: self._predict(self._binary, chance.choice(_SIZES))),
            "parquet by /invocations": (2, lambda chance: self._predict(self._parquet, chance.choice((1, 3, 20)))),
            "JSON by /invocations": (1, lambda chance: self._predict(self._listed, chance.choice((1, 2)))),
            "malformed": (1, self._malformed),
            "of another shape": (1, self._misshapen),
            "clients that go away": (1, self._rude),
            "metrics, probes, statistics": (1, self._pages),
        }

    def _predict(self, client: Client, rows: int) -> None:
        feeds, expected = self._cases[rows]
        if not np.array_equal(client.predict(feeds)["y"], expected["y"]):
            raise RuntimeError("the answer is wrong")

    def _bytes(self, rows: int) -> bytes:
        return as_bytes(tensor_wire.infer_request(self._cases[rows][0], self._model), self._address)

    def _malformed(self, chance: random.Random) -> None:
        wrong = self._bytes(2).replace(b'"FP32"', chance.choice([b'"INT8"', b'"BF16"', b'"FP3]"']))
        connection = Connection(self._address)
        try:
            status, _ = connection.ask(wrong)
        finally:
            connection.close()
        if status != 400:
            raise RuntimeError(f"a malformed request was answered with {status}")

    def _misshapen(self, _: random.Random) -> None:
        with contextlib.suppress(InputError):
            self._binary.predict({"x": np.zeros((2, 3, 64, 63), np.float32)})
            raise RuntimeError("a request of another shape was answered")

    def _rude(self, chance: random.Random) -> None:
        """Goes away in the middle of its request, or before its answer."""
        whole, place = self._bytes(8), urlsplit(self._address)
        with socket.create_connection((str(place.hostname), int(place.port or 80)), timeout=30) as raw:
            raw.sendall(whole[: chance.choice([100, len(whole) // 2, len(whole)])])

    def _pages(self, chance: random.Random) -> None:
        path = chance.choice(["/metrics", "/v2/health/ready", f"/v2/models/{NAME}/stats", "/v2"])
        requests.get(self._address + path, timeout=30).raise_for_status()


def _load(state: Soak, askers: Askers, seconds: float) -> None:
    threads = [
        threading.Thread(target=state.run, args=(name, ask, 100 * number + seed))
        for number, (name, (count, ask)) in enumerate(askers.kinds.items())
        for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(_SAMPLES):
            time.sleep(seconds / _SAMPLES)
            state.resident.append(resident_bytes(state.server.pid))
    finally:
        state.ends.set()
        for thread in threads:
            thread.join()


def _report(state: Soak, seconds: float, console: Console) -> bool:
    third = len(state.resident) // 3
    middle, last = (float(np.median(part)) for part in (state.resident[third : 2 * third], state.resident[2 * third :]))
    growth = last - middle
    is_flat = growth < max(_LEAST_GROWTH, 0.03 * middle)
    for name, count in state.counts.items():
        console.print(f"{name}: {count}")
    console.print(
        f"{sum(state.counts.values())} requests in {seconds:.0f} s, {len(state.problems)} failed or answered wrongly"
    )
    for problem in state.problems[:5]:
        console.print(problem, markup=False)
    console.print(
        f"Memory: {state.resident[0] / 1e6:.0f} MB at first, {middle / 1e6:.0f} in the second third, {last / 1e6:.0f} "
        f"in the last, {max(state.resident) / 1e6:.0f} at most: {'flat' if is_flat else 'GROWS'}"
    )
    return not state.problems and is_flat
