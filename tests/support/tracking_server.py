"""Run `mlflow server` for the length of a block: a real one, over HTTP, that hands out the artifacts itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from servers import ServerProcess

from examples.serving import free_port, running


@contextlib.contextmanager
def tracking_server(folder: Path, empty_database: Path) -> Iterator[str]:
    """The server's address, with a database of its own. It has ended when the block has."""
    shutil.copyfile(empty_database, folder / "server.db")
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination", (folder / "proxied").as_uri(),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    # Its seven processes for background jobs, of which we have none, poll all the time.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with running(ServerProcess(command, environment, ready=f"{address}/health")):
        yield address
