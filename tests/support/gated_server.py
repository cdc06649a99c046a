"""`mlflow-trt serve` with a model on the CPU that waits, or loses its GPU, when it is told to.

    python tests/support/gated_server.py FOLDER PORT SECONDS_OF_DRAINING FRONT_ENDS

It takes three requests at once. A row that begins with -1 waits until there is a file `open` in the folder; one that
begins with 1000 loses the GPU.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import networks
from failing import FailingSession
from helpers import read
from mlflow.models import Model

from mlflow_trt.deploy.serve.limits import Limits
from mlflow_trt.deploy.serve.served_model import ServedModel
from mlflow_trt.deploy.serve.server import ServeOptions, serve
from mlflow_trt.errors import ExecutionError
from mlflow_trt.flavor.pyfunc import PyfuncModel


def load(source, _settings):
    folder = Path(source.uri)
    session = FailingSession(read(networks.product(), folder))
    submit = session.submit

    def gated(feeds, done):
        first = float(feeds["x"].flat[0]) if feeds["x"].size else 0.0
        if first == 1000:
            session.lost = "unspecified launch failure"
            session.failure = ExecutionError("CUDA failed: unspecified launch failure")
        session.before_run = lambda: wait(folder, first)
        return submit(feeds, done)

    session.submit = gated
    return ServedModel(source, session, Model(), PyfuncModel(session))


def wait(folder, first):
    if first == -1:
        (folder / "waiting").touch()
        while not (folder / "open").exists():
            time.sleep(0.01)


if __name__ == "__main__":
    folder, port, drain, front_ends = sys.argv[1:]
    limits = Limits(requests=3, body_bytes=1 << 20, pending_bytes=1 << 21, seconds=30)
    options = ServeOptions(port=int(port), drain_seconds=float(drain), limits=limits, front_ends=int(front_ends))
    sys.exit(not serve([f"product={folder}"], options, lambda _: None, load))
