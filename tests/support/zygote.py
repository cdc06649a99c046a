"""Has imported what takes seconds to import, and forks a process for each command that `forked_program.py` sends.

    python tests/support/zygote.py DESCRIPTOR_OF_A_LISTENING_SOCKET

It ends, and so does what it forked, when its standard input does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import mlflow_trt.cli

# Nothing that starts threads which a forked process would miss: neither TensorRT nor ONNX Runtime.
_PRELOADED = [
    "mlflow.pyfunc",
    "mlflow_trt.deploy.serve.server",
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
        if wanted["command"][0] == "mlflow":
            importlib.import_module("mlflow.cli")  # takes seconds as well, and few files need it
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(wanted, connection))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads, as OpenBLAS has some
            process.start()
        assert process.pid is not None
        for descriptor in wanted["streams"]:
            os.close(descriptor)
        self._running.add(process.pid)
        self._events.register(process.sentinel, selectors.EVENT_READ, partial(self._tell_end, process, connection))
        self._events.register(connection, selectors.EVENT_READ, partial(self._end, process.pid, connection))

    def _run(self, wanted: dict[str, Any], connection: socket.socket) -> None:
        """In the forked process: run the program."""
        os.setsid()
        _send(connection, os.getpid())
        for other in (connection, *(key.fileobj for key in self._events.get_map().values())):
            if isinstance(other, socket.socket):
                other.close()
        self._events.close()
        _become(wanted)
        if (script := Path(sys.argv[0])).suffix == ".py":
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
        elif sys.argv[0] == "mlflow":
            importlib.import_module("mlflow.cli").cli()
        else:
            mlflow_trt.cli.main()

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
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _become(wanted: dict[str, Any]) -> None:
    """What a process is that whoever asked started."""
    variables = wanted["variables"]
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(wanted["folder"])
    for number, stream in enumerate(wanted["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(write_through=bool(variables.get("PYTHONUNBUFFERED")))  # type: ignore[union-attr]
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = wanted["command"]
    # As in a terminal: what runs in the background of a shell has Ctrl-C ignored, and so has what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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
