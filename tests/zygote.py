"""Has imported what takes seconds to import, and forks a process for each command that `tests/forked_program.py` sends.

    python tests/zygote.py DESCRIPTOR_OF_A_LISTENING_SOCKET

It ends, and so does what it forked, when its standard input does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import selectors
import signal
import socket
import struct
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

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
_SECONDS_TO_SEND = 60.0


class Zygote:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._events = selectors.DefaultSelector()
        self._running: set[int] = set()

    def serve(self) -> None:
        """Fork whatever is asked for, until standard input ends."""
        self._events.register(sys.stdin, selectors.EVENT_READ)
        self._events.register(self._listener, selectors.EVENT_READ, self._accept)
        while (act := self._events.select()[0][0].data) is not None:  # one by one: each may be the end of others
            act()
        for pid in self._running:
            _kill(pid)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        wanted = _receive(connection)
        if wanted is None:
            connection.close()
            return
        process = multiprocessing.get_context("fork").Process(target=_run, args=(wanted,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads, as OpenBLAS has some
            process.start()
        assert process.pid is not None
        for descriptor in wanted["streams"]:
            os.close(descriptor)
        _send(connection, process.pid)
        self._running.add(process.pid)
        self._events.register(process.sentinel, selectors.EVENT_READ, partial(self._tell_end, process, connection))
        self._events.register(connection, selectors.EVENT_READ, partial(self._end, process.pid, connection))

    def _tell_end(self, process: multiprocessing.process.BaseProcess, connection: socket.socket) -> None:
        self._events.unregister(process.sentinel)
        if connection in self._events.get_map():
            self._events.unregister(connection)
        process.join()
        assert process.pid is not None
        assert process.exitcode is not None
        self._running.remove(process.pid)
        _send(connection, process.exitcode)
        connection.close()

    def _end(self, pid: int, connection: socket.socket) -> None:
        """Whoever asked for it has gone."""
        self._events.unregister(connection)
        _kill(pid)


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """What to run, and the descriptors of its streams; None where whoever connected has gone."""
    connection.settimeout(_SECONDS_TO_SEND)
    with contextlib.suppress(OSError):
        header, streams, *_ = socket.recv_fds(connection, 4, 3)
        if len(header) == 4:
            (size,) = struct.unpack("!I", header)
            data = connection.recv(size, socket.MSG_WAITALL)
            if len(data) == size:
                return {**json.loads(data), "streams": streams}
    return None


def _send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(struct.pack("!i", number))


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have made its session yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _run(wanted: dict[str, Any]) -> None:
    """Be what a process is that whoever asked started."""
    os.setsid()
    os.environ.clear()
    os.environ.update(wanted["variables"])
    os.chdir(wanted["folder"])
    for number, stream in enumerate(wanted["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    sys.argv = wanted["command"]
    # As in a terminal: what runs in the background of a shell has Ctrl-C ignored, and so has what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from mlflow_trt.cli import main

    main()


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, which is not on the path of a command
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the garbage collectors of forked processes leave alone, and so share, what is here
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        try:
            Zygote(listening).serve()
        finally:
            address = Path(listening.getsockname())
            address.unlink()
            address.parent.rmdir()
