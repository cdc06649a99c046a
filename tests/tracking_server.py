"""Run `mlflow server` for the length of a block: a real one, over HTTP, that hands out the artifacts itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from serving import _free_port


@contextlib.contextmanager
def tracking_server(folder: Path, empty_database: Path) -> Iterator[str]:
    """The server's address, with a database of its own. It has ended when the block has."""
    shutil.copyfile(empty_database, folder / "server.db")
    address = f"http://127.0.0.1:{(port := _free_port())}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination", (folder / "proxied").as_uri(),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    # mlflow starts uvicorn by its name.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_ready(server, address, log)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(timeout=30)
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_ready(server, address: str, log) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"the tracking server did not start:\n{log.read()}")
