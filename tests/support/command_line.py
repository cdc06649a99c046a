"""Runs commands as processes of their own, forked from one that has imported what takes seconds to import."""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from forked_program import Forked
from repository import ROOT

_HERE = Path(__file__).resolve().parent
_TIMEOUT_SECONDS = 600


@functools.cache
def zygote() -> str:
    """Start `zygote.py`, which ends when this process does, and return the path of its socket.

    Whoever connects to it waits until it has imported all.
    """
    address = str(Path(tempfile.mkdtemp(prefix="zygote-"), "socket"))  # which has to be short
    # What a test sets for itself is not for what is imported once for all.
    own = ("MLFLOW_", "CUDA_", "PYTHONUNBUFFERED")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, _HERE / "zygote.py", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**variables, "PYTHONPATH": path, "DO_NOT_TRACK": "true"},
            start_new_session=True,
        )

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    atexit.register(end)
    return address


def write_program(folder: Path) -> None:
    """Write a program `mlflow-trt` into this folder, for the path of a shell: one that is forked, unless it serves."""
    installed = Path(sys.executable).with_name("mlflow-trt")
    real = shlex.quote(str(installed)) if installed.exists() else f"{shlex.quote(sys.executable)} -m mlflow_trt"
    forked = shlex.join([sys.executable, "-IS", str(_HERE / "forked_program.py"), zygote(), "mlflow-trt"])
    program = folder / "mlflow-trt"
    # A server is a process of the shell's own, which sends signals to it and to what it starts.
    program.write_text(f'#!/bin/sh\ncase "$1" in serve) exec {real} "$@";; esac\nexec {forked} "$@"\n')
    program.chmod(0o755)


class Result(NamedTuple):
    code: int
    output: str
    errors: str


class Command:
    """A command that was started, and the files that it prints to."""

    def __init__(self, process: Forked, streams: list[Path]) -> None:
        self._process = process
        self._streams = streams

    @property
    def has_ended(self) -> bool:
        return self._process.has_ended

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def result(self) -> Result:
        """Once it has ended, which it is made to after a while."""
        code = self._process.wait(_TIMEOUT_SECONDS)
        return Result(code, *(stream.read_text() for stream in self._streams))


@contextmanager
def started(
    *arguments: object, program: str = "mlflow-trt", cwd: Path | None = None, **environment: str
) -> Iterator[Command]:
    """Start a program with these arguments, in this folder, with these variables besides those of this process."""
    variables = {**os.environ, "COLUMNS": "200", **environment}
    line = [program, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        with Path(os.devnull).open("rb") as nothing, streams[0].open("wb") as output, streams[1].open("wb") as errors:
            descriptors = [nothing.fileno(), output.fileno(), errors.fileno()]
            process = Forked(zygote(), line, str(cwd or Path.cwd()), variables, descriptors)
        try:
            yield Command(process, streams)
        finally:
            process.end()


def run(*arguments: object, program: str = "mlflow-trt", cwd: Path | None = None, **environment: str) -> Result:
    """As `started`, and wait for its end."""
    with started(*arguments, program=program, cwd=cwd, **environment) as command:
        return command.result()
