"""Connections with an end, also where a client never comes to the end of its request's head, or does not close."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST_HEAD = 1 << 16
_FAREWELL = 3.0  # seconds for a client that has its answer, when the server ends


class Connection(HttpToolsProtocol):
    """A connection that ends where the head of a request does not come in time or has no end, and with the server.

    Args:
        head_seconds: for the head of a request, and for the first one to begin.
        arguments: uvicorn's.
    """

    def __init__(self, *, head_seconds: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._head_seconds = head_seconds
        self._is_in_head = False
        self._head_bytes = 0
        self._until: asyncio.TimerHandle | None = None
        self._server_ends = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        if was_in_head:  # else a body may have come in the same piece
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD:
                self.send_400_response("The head of the request is too long.")
                return
        if self._until is None:
            self._await_head()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def shutdown(self) -> None:
        """The server ends, and this with it when the request that it has is answered."""
        super().shutdown()
        self._server_ends = True
        self._part()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._server_ends:
            self._part()

    def _part(self) -> None:
        """Over TLS, each end waits until the other says that it closes, too; a client that is idle says nothing, and
        the server would wait for half a minute.
        """
        if self.scheme == "https" and self.transport.is_closing():
            self.loop.call_later(_FAREWELL, self.transport.abort)

    def _await_head(self) -> None:
        self._until = self.loop.call_later(self._head_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None

    def _give_up(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # it works on the request before, and may not have read the rest of this one
        else:
            self._until = None
            self.transport.close()
