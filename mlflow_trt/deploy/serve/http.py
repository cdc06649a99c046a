"""The little of HTTP that the server needs, on ASGI without a framework: bodies in, answers out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mlflow_trt.core import open_inference as oip
from mlflow_trt.deploy.serve import json_text
from mlflow_trt.deploy.serve.limits import Ticket
from mlflow_trt.deploy.serve.problems import Cause, DisconnectedError, HttpError
from mlflow_trt.deploy.serve.uvicorn_config import Message, Receive, Scope, Send
from mlflow_trt.runtime.native import address

Header = tuple[bytes, bytes]

JSON = b"application/json"
_ALIGNMENT = 16
_MOST_DISCARDED = 1 << 30


class Exchange:
    """One request and its answer.

    Attributes:
        status: what was answered; 0 before.
        received: bytes of its body, so far.
        sent: bytes of the answer's body.
        is_read: the whole body has come.
        closes: the answer ends the connection.
    """

    __slots__ = (
        "_has_begun",
        "_receive",
        "_send",
        "closes",
        "headers",
        "is_read",
        "received",
        "scope",
        "sent",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, closes: bool = False) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.closes = closes
        self.status = 0
        self.received = 0
        self.sent = 0
        self.is_read = False
        self._has_begun = False
        self._receive = receive
        self._send = send

    def number(self, header: str) -> int | None:
        """A header that is a number of bytes. Raises HttpError, 400, for anything else."""
        value = self.headers.get(header.encode())
        if value is None:
            return None
        if not value.isdigit() or len(value) > 18:
            raise HttpError(400, Cause.BAD_REQUEST, f"the header {header} is no number of bytes")
        return int(value)

    async def read(self, ticket: Ticket, *, aligned_at: int = 0) -> memoryview:
        """The body, with what begins at `aligned_at` where numbers of any type may lie.

        Raises DisconnectedError, and what `Ticket.hold` raises.
        """
        if self.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise HttpError(415, Cause.BAD_REQUEST, "the body is compressed, which this server does not read")
        size = self.number("content-length")
        if size is not None:
            ticket.hold(size)
            return await self._read_known(size, -aligned_at % _ALIGNMENT)
        return await self._read_chunks(ticket, -aligned_at % _ALIGNMENT)

    async def _read_known(self, size: int, start: int) -> memoryview:
        message = await self._next()
        chunk = message.get("body", b"")
        if not message.get("more_body") and _misalignment(chunk) == start:
            return memoryview(chunk)  # it came whole: small ones do, and those that a front end read
        buffer = bytearray(start + size)
        at = start
        while True:
            buffer[at : at + len(chunk)] = chunk
            at += len(chunk)
            if not message.get("more_body"):
                return memoryview(buffer)[start:at]
            message = await self._next()
            chunk = message.get("body", b"")

    async def _read_chunks(self, ticket: Ticket, start: int) -> memoryview:
        buffer = bytearray(start)
        while True:
            message = await self._next()
            chunk = message.get("body", b"")
            ticket.hold(len(chunk))
            buffer += chunk
            if not message.get("more_body"):
                return memoryview(buffer)[start:]

    async def discard(self) -> None:
        """Throw away what is left of the body, so that a client that still sends comes to read the answer.

        Where there is no end of it, the connection ends. A client that waits to be told to send is not told.
        """
        if self.is_read:
            return
        if not self._has_begun and b"expect" in self.headers:
            self.closes = True
            return
        left = _MOST_DISCARDED
        while left > 0 and not self.is_read:
            left -= len((await self._next()).get("body", b""))
        self.closes = self.closes or not self.is_read

    async def disconnected(self) -> None:
        """Return when the client is gone; after its body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> Message:
        self._has_begun = True
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        self.is_read = not message.get("more_body")
        self.received += len(message.get("body", b""))
        return message

    async def answer(
        self, status: int, parts: Iterable[bytes | memoryview], kind: bytes = JSON, headers: Iterable[Header] = ()
    ) -> None:
        """Send it whole. Raises DisconnectedError."""
        body = b"".join(parts)
        self.status, self.sent = status, len(body)
        sent = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
        if self.closes:
            sent.append((b"connection", b"close"))
        try:
            await self._send({"type": "http.response.start", "status": status, "headers": sent})
            await self._send({"type": "http.response.body", "body": body})
        except RuntimeError as error:  # uvloop's: uvicorn tells only the last request of a connection that it has ended
            raise DisconnectedError from error

    async def answer_json(self, value: Any, status: int = 200) -> None:
        await self.answer(status, [json_text.write(value)])

    async def answer_error(self, error: HttpError) -> None:
        self.closes = self.closes or error.closes
        await self.answer(error.status, [json_text.write({"error": error.message})], headers=error.headers)

    async def answer_tensors(self, parts: list[bytes | memoryview], header_length: int | None) -> None:
        """An answer of the protocol, with tensors after the first so many bytes."""
        if header_length is None:
            await self.answer(200, parts)
            return
        length = (oip.HEADER_LENGTH.encode(), b"%d" % header_length)
        await self.answer(200, parts, oip.BINARY.encode(), [length])


def _misalignment(chunk: bytes | memoryview) -> int:
    """Of its first byte in memory."""
    return 0 if isinstance(chunk, bytes) else address(np.frombuffer(chunk, np.uint8)) % _ALIGNMENT
