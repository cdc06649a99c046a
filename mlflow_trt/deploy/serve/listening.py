"""Sockets that a server listens on, alone or with its front ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

_LAST_STANDARD_STREAM = 2
_MOST_MILLISECONDS = (1 << 31) - 1


def bind(host: str, port: int, front_ends: int, *, reuse_port: bool, seconds: float) -> list[socket.socket]:
    """One socket, or one for each front end, all at the same address.

    A client that takes nothing of its answer for so many seconds loses its connection: the kernel sees to it, and
    without it the answer would be kept forever.

    Taken before models are loaded, which may last minutes, and open for connections after. Raises OSError.
    """
    first = _bound(host, port, shared=reuse_port)
    if not front_ends:
        return [_impatient(first, seconds)]
    port = first.getsockname()[1]
    first.close()  # it said that nobody else listens there; now several do
    bound: list[socket.socket] = []
    try:
        bound.extend(_impatient(_bound(host, port, shared=True), seconds) for _ in range(front_ends))
    except OSError:
        for one in bound:
            one.close()
        raise
    return bound


def listen(sockets: Sequence[socket.socket], host: str, *, reuse_port: bool) -> None:
    """Let connections wait for front ends.

    Raises OSError where another server with front ends has the address by now: sockets that share it can be bound as
    long as none listens.
    """
    if not reuse_port:
        with contextlib.closing(_bound(host, sockets[0].getsockname()[1], shared=False)) as alone:
            alone.listen()
    for bound in sockets:
        bound.listen()


def occupy_standard_streams() -> None:
    """Or sockets would have the numbers of those that whoever started the server closed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD_STREAM:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _impatient(bound: socket.socket, seconds: float) -> socket.socket:
    """The connections that it takes inherit this."""
    milliseconds = min(max(int(seconds * 1e3), 1), _MOST_MILLISECONDS)
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return bound


def _bound(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listening
