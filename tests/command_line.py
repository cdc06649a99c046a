"""Runs commands as processes of their own, forked from one that has imported what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_TIMEOUT_SECONDS = 600
# Nothing that starts threads which a forked process would miss: neither TensorRT nor ONNX Runtime.
_PRELOADED = [
    "mlflow.pyfunc",
    "mlflow_trt.cli",
    "mlflow_trt.flavor.api",
    "mlflow_trt.registry.convert_all",
    # What these import when they need it: for a precision of 16 or 8 bits, and for a store on SQLite.
    "onnx_ir.passes.common",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "alembic.command",
    "git",
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_PRELOADED)


class Result(NamedTuple):
    code: int
    output: str
    errors: str


class Command:
    """A command that was started, and the files that it prints to."""

    def __init__(self, process: multiprocessing.process.BaseProcess, streams: list[str]) -> None:
        self._process = process
        self._streams = streams

    @property
    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def result(self) -> Result:
        """Once it has ended, which it is made to after a while."""
        self._process.join(_TIMEOUT_SECONDS)
        self.kill()
        assert self._process.exitcode is not None
        return Result(self._process.exitcode, *(Path(stream).read_text() for stream in self._streams))

    def kill(self) -> None:
        if not self.has_ended:
            self._process.kill()
            self._process.join()


@contextmanager
def started(*arguments: object, cwd: Path | None = None, **environment: str) -> Iterator[Command]:
    """Start `mlflow-trt` with these arguments, in this folder, with these variables besides those of this process."""
    variables = {**os.environ, "COLUMNS": "200", **environment}
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        line = ["mlflow-trt", *map(str, arguments)]
        process = _forks.Process(target=_run, args=(line, variables, str(cwd or Path.cwd()), streams))
        process.start()
        command = Command(process, streams)
        try:
            yield command
        finally:
            command.kill()


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> Result:
    """As `started`, and wait for its end."""
    with started(*arguments, cwd=cwd, **environment) as command:
        return command.result()


def _run(command: list[str], variables: dict[str, str], folder: str, streams: list[str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = command
    # As in a terminal: what runs in the background of a shell has Ctrl-C ignored, and so has what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from mlflow_trt.cli import main

    main()
