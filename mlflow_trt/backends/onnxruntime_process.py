"""ONNX files from outside on ONNX Runtime, in a process of their own: one that crashes it ends that process alone.

Everything that a conversion runs goes through here. One process serves a whole conversion; after a crash, the next
model gets a new one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlflow_trt.backends import shared_arrays
from mlflow_trt.backends.onnxruntime import NUMPY_TYPES, check_installed, load_error, run_error
from mlflow_trt.core.arrays import Array
from mlflow_trt.errors import ExecutionError, MlflowTrtError, OutOfMemoryError

_WORKER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from mlflow_trt.backends.onnxruntime_worker import main
main(int(sys.argv[2]))
"""
_LINES_QUOTED = 5


class _FailedError(Exception):
    """What ONNX Runtime raised in the process: its release, the name of the exception, and its text."""

    def __init__(self, version: str, kind: str, text: str) -> None:
        super().__init__(text)
        self.version, self.kind, self.text = version, kind, text

    @property
    def load_error(self) -> MlflowTrtError:
        return load_error(self.version, self.text)

    @property
    def run_error(self) -> MlflowTrtError:
        return run_error(self.version, self.kind, self.text)


@dataclass(frozen=True, kw_only=True)
class _Child:
    """A running process, the socket to it, and the file that it and the libraries in it print to."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    printed: IO[bytes]

    @classmethod
    def start(cls) -> _Child:
        ours, theirs = socket.socketpair()
        printed = tempfile.TemporaryFile()  # noqa: SIM115  # closed in end
        paths = json.dumps([entry for entry in sys.path if entry and isinstance(entry, str)])
        with theirs:
            process = subprocess.Popen(  # noqa: S603  # this interpreter, with our own module
                [sys.executable, "-I", "-c", _WORKER, paths, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the other
            )
        return cls(process=process, channel=ours, printed=printed)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()
        self.printed.close()

    def last_words(self) -> str:
        """How it ended, and what was printed last."""
        status = self.process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self.printed.seek(0)
        lines = [line.strip() for line in self.printed.read().decode(errors="replace").splitlines()]
        words = " | ".join([line for line in lines if line][-_LINES_QUOTED:])
        return f"{how}. Its last words: {words}" if words else how


class OnnxRuntimeProcess:
    """The process: started when something is opened in it, and again after it has crashed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._oldest = 0
        self._dropped: list[int] = []
        self._child: _Child | None = None
        self._crash = ""

    def open(self, do: str, what: Path, **fields: Any) -> tuple[int, Any]:
        """Open something in the process: the number that it has there, and the answer.

        Raises ExecutionError where the process crashes, _FailedError where ONNX Runtime raises an error.
        """
        check_installed()
        number = next(self._numbers)
        with self._lock:
            if self._child is None:
                self._child, self._oldest = _Child.start(), number
                weakref.finalize(self, self._child.end)
        return number, self.ask(do, number, f"load {what.name}", path=str(what.absolute()), **fields)[0]

    def ask(
        self, do: str, number: int, purpose: str, arrays: Mapping[str, Array] | None = None, **fields: Any
    ) -> tuple[Any, dict[str, Array]]:
        """An answer about what was opened under that number. Raises what `open` raises."""
        with self._lock:
            if self._child is None or number < self._oldest:
                raise ExecutionError(self._crash)
            dropped, self._dropped = self._dropped, []
            request = {"do": do, "number": number, "dropped": dropped, **fields}
            answer, results = self._exchange(self._child, request, arrays or {}, purpose)
        if "error" in answer:
            raise _FailedError(answer["version"], answer["error"], answer["text"])
        return answer, results

    def drop(self, number: int) -> None:
        """Let the process forget something, when it is asked the next time."""
        self._dropped.append(number)

    def close(self) -> None:
        """End the process. What was opened in it cannot be used any more."""
        self._crash = self._crash or "the process that ran this model was ended"
        if self._child is not None:
            self._child.end()
            self._child = None

    def _exchange(
        self, child: _Child, request: Mapping[str, Any], arrays: Mapping[str, Array], purpose: str
    ) -> tuple[Any, dict[str, Array]]:
        try:
            shared_arrays.send(child.channel, request, arrays)
            return shared_arrays.receive(child.channel)
        except TypeError as error:
            raise ExecutionError(f"ONNX Runtime cannot take this from Python: {error}") from error
        except (EOFError, ConnectionError) as error:
            self._crash = (
                f"ONNX Runtime crashed when it was to {purpose}: its process {child.last_words()}. The model is "
                "damaged, or made to do this, or ONNX Runtime has a fault: check the model, or try another release"
            )
            self.close()
            raise ExecutionError(self._crash) from error
        except OSError as error:
            raise OutOfMemoryError(f"there is no memory for the arrays of this model: {error.strerror}") from error
        except BaseException:  # an interrupt: what comes next would be the answer to this
            self.close()
            raise


_current: ContextVar[OnnxRuntimeProcess | None] = ContextVar("onnxruntime_process", default=None)


@contextmanager
def shared_process() -> Iterator[None]:
    """Let all models that are opened in this block share one process, that of the block around this one if any."""
    if _current.get() is not None:
        yield
        return
    process = OnnxRuntimeProcess()
    token = _current.set(process)
    try:
        yield
    finally:
        _current.reset(token)
        process.close()


class IsolatedModel:
    """An ONNX file on ONNX Runtime's CPU provider, in the process of the block, or in one of its own.

    With `optimize=False` every node computes what it says, one after the other.

    Raises MissingDependencyError without ONNX Runtime, ExecutionError for what it cannot run and what crashes it.
    """

    def __init__(self, path: Path, *, optimize: bool = True) -> None:
        self._process = _current.get() or OnnxRuntimeProcess()
        self._purpose = f"run {path.name}"
        try:
            self._number, answer = self._process.open("load", path, optimize=optimize)
        except _FailedError as error:
            raise error.load_error from error
        self._outputs: list[tuple[str, str, list[Any]]] = answer["outputs"]
        weakref.finalize(self, self._process.drop, self._number)

    @property
    def output_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """By name, as ONNX Runtime infers them; None for what varies."""
        return {
            name: tuple(size if isinstance(size, int) else None for size in shape) for name, _, shape in self._outputs
        }

    @property
    def output_types(self) -> dict[str, np.dtype[Any] | None]:
        """By name, as ONNX Runtime infers them; None for what numpy does not have, and for what is no tensor."""
        return {name: NUMPY_TYPES.get(kind) for name, kind, _ in self._outputs}

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of these names. Raises InputError, ExecutionError or OutOfMemoryError."""
        if not names:
            return {}  # ONNX Runtime would return all there are
        try:
            return self._process.ask("run", self._number, self._purpose, feeds, names=list(names))[1]
        except _FailedError as error:
            raise error.run_error from error


def calibrated_magnitudes(
    path: Path, feeds: Sequence[Mapping[str, Array]], method: str, operators: Sequence[str], workdir: Path
) -> dict[str, float]:
    """The magnitude to cut off at, by ONNX Runtime's calibration, for what these operators read and write.

    `method` is `entropy` or `percentile`. Raises ExecutionError where it fails or crashes.
    """
    process = _current.get() or OnnxRuntimeProcess()
    purpose = f"calibrate {path.name}"
    with contextlib.ExitStack() as stack:
        stack.callback(process.close if _current.get() is None else lambda: None)
        try:
            number, _ = process.open(
                "calibrate", path, method=method, operators=list(operators), augmented=str(workdir / "calibration.onnx")
            )
            for one in feeds:
                process.ask("collect", number, purpose, one)
            largest: dict[str, float] = process.ask("ranges", number, purpose)[0]["largest"]
        except _FailedError as error:
            raise error.run_error from error
    return largest
