"""Servers that are forked, as commands are, from a process that has imported what takes seconds to import."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from command_line import zygote
from forked_program import Forked

from examples import serving


class _Process(Forked):
    """With the face of `subprocess.Popen`, as far as servers are concerned."""

    def poll(self) -> int | None:
        return self.wait() if self.has_ended else None

    def wait(self, timeout: float | None = None) -> int:
        try:
            return super().wait(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired("the server", timeout or 0) from None


class ServerProcess(serving.ServerProcess):
    """`command` is `python SCRIPT`, `python -m mlflow_trt` or `python -m mlflow`, with arguments."""

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> Any:
        _, *line = command
        if line[0] == "-m":
            line[:2] = [line[1].replace("_", "-")]
        with Path(os.devnull).open("rb") as nothing:
            log = self._log.fileno()
            return _Process(zygote(), line, str(Path.cwd()), environment, (nothing.fileno(), log, log))


class TensorServer(ServerProcess, serving.TensorServer):
    """`mlflow-trt serve` on a free port of 127.0.0.1."""


class Server(ServerProcess, serving.Server):
    """`mlflow models serve` on a port of 127.0.0.1; what that starts is no fork of ours."""


@contextlib.contextmanager
def served(model_uri: str, tracking_uri: str, model_config: Mapping[str, Any], **options: Any) -> Iterator[str]:
    """Serve a model and give the server's address. The server has ended when the block has. Options as for Server."""
    server = Server(model_uri, tracking_uri, model_config, **options)
    with serving.running(server):
        yield server.address
