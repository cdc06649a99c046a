"""Run `mlflow models serve`, or another server, for the length of a block."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

START_SECONDS = 180


class ServerProcess:
    """A command that serves HTTP, in a process group of its own: what it starts ends with it.

    Args:
        command: what to run.
        environment: its environment variables, all of them.
        ready: the address that answers once it is ready.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], ready: str) -> None:
        self.address = "{0.scheme}://{0.netloc}".format(urlsplit(ready))
        self._ready = ready
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by stop()
        # mlflow starts uvicorn by its name.
        path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        self._process = self._start(command, {**environment, "PATH": path})

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_until_ready(self) -> None:
        """Return when the server answers. Raises RuntimeError, with what it printed, if it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(self._ready, timeout=5).ok:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log()}")

    @property
    def pid(self) -> int:
        """The process that was started."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process that was started is no more."""
        return self._process.poll() is not None

    def log(self) -> str:
        """What it printed so far."""
        self._log.seek(0)
        return self._log.read()

    def kill(self) -> None:
        """End it and what it started at once, without giving them time for anything."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Ask it to end, and see to it. May be called more than once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=30)
        self.kill()
        self._log.close()


@contextlib.contextmanager
def running(server: ServerProcess) -> Iterator[None]:
    """The server is ready when the block begins, and has ended when the block has."""
    try:
        server.wait_until_ready()
        yield
    finally:
        server.stop()


class Server(ServerProcess):
    """`mlflow models serve` on a port of 127.0.0.1.

    Args:
        model_uri: any model URI of MLflow.
        tracking_uri: where that is looked up.
        model_config: load settings.
        workers: how many processes load the model; MLflow's default is 1.
        port: None takes a free one.
        environment: further environment variables of the server.
    """

    def __init__(
        self,
        model_uri: str,
        tracking_uri: str,
        model_config: Mapping[str, Any],
        *,
        workers: int | None = None,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model_uri]
        command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", str(workers)] if workers else []
        variables = {
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking_uri,
            "MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps(model_config),
            **(environment or {}),
        }
        super().__init__(command, variables, ready=f"{self.address}/ping")


class TensorServer(ServerProcess):
    """`mlflow-trt serve` on a free port of 127.0.0.1.

    Args:
        models: URIs of MLflow, or folders, each perhaps after `NAME=`.
        options: of the command, each followed by its value.
        model_config: load settings.
        environment: further environment variables of the server.
    """

    def __init__(
        self,
        *models: str,
        options: Sequence[str] = (),
        model_config: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "mlflow_trt", "serve", *models, "--port", str(self.port)]
        command += ["--model-config", json.dumps(model_config), *options]
        super().__init__(command, {**os.environ, **(environment or {})}, ready=f"{self.address}/v2/health/ready")


@contextlib.contextmanager
def served(model_uri: str, tracking_uri: str, model_config: Mapping[str, Any], **options: Any) -> Iterator[str]:
    """Serve a model and give the server's address. The server has ended when the block has. Options as for Server."""
    server = Server(model_uri, tracking_uri, model_config, **options)
    with running(server):
        yield server.address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
