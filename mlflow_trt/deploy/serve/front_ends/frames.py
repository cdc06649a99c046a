"""What a front end and the server tell each other over a socket: objects of JSON, each with bytes that go with it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable
from typing import Any

import orjson

Told = dict[str, Any]
_LENGTHS = struct.Struct("<IQ")  # of the JSON, and of the bytes


def told_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """HTTP headers for JSON, which has no bytes."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def headers_of(told: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """What `told_headers` was given."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in told]


class Frames(asyncio.Protocol):
    """One end of the connection.

    Args:
        heard: called with what the other end told, and its bytes.
        lost: called when the connection has ended.
    """

    def __init__(self, heard: Callable[[Told, bytes], None], lost: Callable[[], None]) -> None:
        self._heard = heard
        self._lost = lost
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._unsent: list[bytes | memoryview] = []

    def tell(self, told: Told, data: bytes | memoryview = b"") -> None:
        """Send it, together with what else is told at this turn of the event loop; nothing where nobody is there."""
        if self._transport is None or self._transport.is_closing():
            return
        text = orjson.dumps(told)
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send)
        self._unsent += (_LENGTHS.pack(len(text), len(data)), text, data)

    async def drain(self) -> None:
        """Wait while there is much that was not sent yet."""
        self._send()
        await self._writable.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._send()
            self._transport.close()

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(unsent))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # that of a socket writes, too

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._writable.set()
        lost, self._heard, self._lost = self._lost, _ignore, _ignore  # what they belong to refers to this, too
        lost()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        at = 0
        while len(received) - at >= _LENGTHS.size:
            text_size, data_size = _LENGTHS.unpack_from(received, at)
            text = at + _LENGTHS.size
            end = text + text_size + data_size
            if len(received) < end:
                break
            at = end
            self._heard(orjson.loads(received[text : text + text_size]), bytes(received[end - data_size : end]))
        del received[:at]


def _ignore(*_: object) -> None:
    """Nothing is heard after the end."""
