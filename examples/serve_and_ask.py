"""`mlflow-trt serve` and its client: what a request takes, for one picture and for many, on both wires.

    pip install 'mlflow-trt[rtx,serve,client]'
    python examples/serve_and_ask.py

The server runs on a free port of 127.0.0.1 and ends with the program. It answers the client by the Open Inference
Protocol, with arrays as they lie in memory, and at /invocations JSON, as MLflow's own server does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import requests
from ocr_models import DIRECTION, Pixels, line_batch, line_picture, ocr_model
from rich.console import Console
from rich.table import Table
from serving import TensorServer, running

import mlflow_trt
from mlflow_trt.client import Client

ROWS, CALLS = (1, 4, 16), 7


def by_client(client: Client, batch: Pixels) -> Pixels:
    (outputs,) = client.predict({"x": batch}).values()
    return np.asarray(outputs, np.float32)


def by_json(http: requests.Session, address: str, batch: Pixels) -> Pixels:
    answer = http.post(f"{address}/invocations", json={"inputs": {"x": batch.tolist()}}, timeout=60)
    answer.raise_for_status()
    (outputs,) = answer.json()["predictions"].values()
    return np.asarray(outputs, np.float32)


def milliseconds(ask: Callable[[Pixels], Pixels], batch: Pixels) -> list[float]:
    """What each call took, without a first one that warms everything up."""
    times = []
    for _ in range(CALLS + 1):
        begin = time.perf_counter()
        ask(batch)
        times.append(1000 * (time.perf_counter() - begin))
    return times[1:]


def main() -> None:
    pictures = line_batch(
        [line_picture(f"request {number}").rotate(180 * (number % 2)) for number in range(max(ROWS))], 192
    )
    table = Table(title="Requests to mlflow-trt serve, one after the other", title_justify="left")
    for heading in ("pictures", "wire", "median ms", "slowest ms", "pictures/s", "difference"):
        table.add_column(heading, justify="left" if heading == "wire" else "right")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "direction"
        shapes = {"x": ((-1, 3, 48, 192),) * 3}
        mlflow_trt.save_model(ocr_model(DIRECTION), folder, batch=(1, 8, 32), shapes=shapes, calibration_data=pictures)
        with mlflow_trt.load_model(str(folder), runtime="auto") as session:
            (expected,) = session.run({"x": pictures}).values()
        server = TensorServer(f"direction={folder}", model_config={"runtime": "auto"})
        with running(server), Client(server.address) as client, requests.Session() as http:
            wires = {"client": partial(by_client, client), "JSON": partial(by_json, http, server.address)}
            for rows in ROWS:
                for wire, ask in wires.items():
                    difference = float(np.abs(ask(pictures[:rows]) - expected[:rows]).max())
                    times = milliseconds(ask, pictures[:rows])
                    speed = f"{1000 * rows / np.median(times):,.0f}"
                    cells = f"{np.median(times):.1f}", f"{max(times):.1f}", speed, f"{difference:.1e}"
                    table.add_row(str(rows), wire, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
