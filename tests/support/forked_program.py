"""Asks `zygote.py` for a process that runs a program, as if that had been started here; nothing but this file and
Python's own library is needed, since it is started for each.

    python -IS tests/support/forked_program.py SOCKET PROGRAM [ARGUMENT ...]
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Forked:
    """A process that runs a program, in a session of its own. It is killed when this process ends before it."""

    def __init__(
        self,
        address: str,
        command: Sequence[str],
        folder: str,
        variables: Mapping[str, str],
        streams: Sequence[int],
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(address)
        wanted = json.dumps({"command": list(command), "folder": folder, "variables": dict(variables)}).encode()
        socket.send_fds(self._connection, [struct.pack("!I", len(wanted))], list(streams))
        self._connection.sendall(wanted)
        self.pid = self._read()
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """What it ended with, or the negative number of the signal that ended it. Raises TimeoutError."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = self._read()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    @property
    def has_ended(self) -> bool:
        try:
            self.wait(0)
        except BlockingIOError:
            return False
        return True

    def end(self) -> None:
        """See to it that it has ended."""
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def _read(self) -> int:
        data = self._connection.recv(4, socket.MSG_WAITALL)
        if len(data) < 4:
            raise ConnectionError("the process that forks others has ended; its standard error says why")
        return int(struct.unpack("!i", data)[0])


def main(address: str, *command: str) -> None:
    process = Forked(address, command, os.getcwd(), os.environ, (0, 1, 2))  # noqa: PTH109  # pathlib takes time
    for number in _FORWARDED:
        signal.signal(number, lambda which, _: process.send_signal(which))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
