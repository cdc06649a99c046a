"""The process of a front end. It imports little, and nothing that knows of models."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import mmap
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import uvicorn

from mlflow_trt.deploy.serve.front_ends import SIGNALS
from mlflow_trt.deploy.serve.front_ends.frames import Frames, Told, headers_of, told_headers
from mlflow_trt.deploy.serve.front_ends.memory import REQUEST_BYTES, SMALL, Blocks, map_memory
from mlflow_trt.deploy.serve.uvicorn_config import Message, Receive, Scope, Send, uvicorn_config

_ALIGNMENT = 16
_MOST_DIGITS = 18
_HEADER_LENGTH = b"inference-header-content-length"  # tensors begin after it: open_inference.HEADER_LENGTH


class _Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


_END = b'{"error":"the server has ended"}'
_ENDED = _Answer(
    503,
    [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_END)), (b"connection", b"close")],
    _END,
)


class _Call:
    """A request that the server works on."""

    def __init__(self, number: int, scope: Scope) -> None:
        self.number = number
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.answer: asyncio.Future[_Answer | None] = asyncio.get_running_loop().create_future()
        self.parts: list[bytes] = []  # of the answer, so far
        self.wanted = asyncio.Event()

    @property
    def waits_to_be_told(self) -> bool:
        """Whether the client sends no body before it is told that it may."""
        return b"expect" in self.headers

    @property
    def body_size(self) -> int | None:
        return self._number(b"content-length")

    @property
    def padding(self) -> int:
        """Bytes before the body, so that its tensors lie where numbers of any type may."""
        return -(self._number(_HEADER_LENGTH) or 0) % _ALIGNMENT

    def _number(self, header: bytes) -> int | None:
        """None also for what the server refuses."""
        value = self.headers.get(header, b"")
        return int(value) if value.isdigit() and len(value) <= _MOST_DIGITS else None


class Relay:
    """The ASGI application of a front end: gives requests to the server, and its answers to clients.

    Args:
        memory: what both map.

    Attributes:
        frames: the connection to the server.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memoryview(memory)
        self._blocks = Blocks(0, REQUEST_BYTES)
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count()
        self.frames = Frames(self._hear, self._lose)
        self.stopped = asyncio.Event()
        self._is_lost = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay a request, as ASGI has it."""
        if self._is_lost:
            await _answer(send, _ENDED)
            return
        call = _Call(next(self._numbers), scope)
        self._calls[call.number] = call
        sending = asyncio.ensure_future(self._send_request(call, scope, receive))
        sending.add_done_callback(lambda task: _pass_failure(task, call.answer))
        try:
            answer = await call.answer
        finally:
            sending.cancel()
            if self._calls.pop(call.number, None) is not None:  # the server works on it in vain
                self.frames.tell({"gone": call.number})
        if answer is not None:
            with contextlib.suppress(RuntimeError):  # uvloop's: the connection is closed
                await _answer(send, answer)

    async def _send_request(self, call: _Call, scope: Scope, receive: Receive) -> None:
        """Give the server the request, and tell it when the client goes away before it has its answer."""
        told = {"begin": call.number, "scope": _told_scope(scope)}
        if call.waits_to_be_told:
            self.frames.tell(told)
            await call.wanted.wait()
            message = await receive()
        else:
            first = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            if first.done() and _is_last(first.result()):  # it has come already: small ones go with their head
                self.frames.tell({**told, "whole": True}, first.result().get("body", b""))
                message = await receive()
            else:
                self.frames.tell(told)
                message = await first
        await self._send_body(call, receive, message)

    async def _send_body(self, call: _Call, receive: Receive, message: Message) -> None:
        if message.get("more_body") and (size := call.body_size) is not None and size > SMALL:
            block = self._blocks.take(call.padding + size)
            if block is not None:
                message = await self._place_body(call, receive, message, block, size)
        while message["type"] != "http.disconnect":
            more = message.get("more_body", False)
            self.frames.tell({"body": call.number, "more": more}, message.get("body", b""))
            await self.frames.drain()
            message = await receive()
        self.frames.tell({"gone": call.number})

    async def _place_body(self, call: _Call, receive: Receive, message: Message, block: int, size: int) -> Message:
        """Put the body where the server can read it, which gives the block back; returns what came after."""
        start = block + call.padding
        place, came = self._memory[start : start + size], 0
        is_ours = True
        try:
            while message["type"] != "http.disconnect":
                chunk = message.get("body", b"")
                place[came : came + len(chunk)] = chunk
                came += len(chunk)
                if not message.get("more_body"):
                    is_ours = False
                    self.frames.tell({"body": call.number, "more": False, "block": block, "at": start, "size": came})
                    return await receive()
                message = await receive()
        finally:
            if is_ours:
                self._blocks.give_back(block)
        return message

    def _hear(self, told: Told, data: bytes) -> None:
        if "call" in told:
            self._hear_of_call(told["call"], told, data)
        elif "free" in told:
            for block in told["free"]:
                self._blocks.give_back(block)
        elif "stop" in told:
            self.stopped.set()
        elif "alive" in told:
            self.frames.tell({"alive": True})

    def _hear_of_call(self, number: int, told: Told, data: bytes) -> None:
        if "at" in told:  # the answer lies in memory
            data = bytes(self._memory[told["at"] : told["at"] + told["size"]])
            self.frames.tell({"free": told["at"]})
        call = self._calls.get(number)
        if call is None:  # nobody waits for it any more
            return
        if "wanted" in told:
            call.wanted.set()
        elif "part" in told:
            call.parts.append(data)
        elif "ended" in told:
            self._settle(number, None)
        else:
            body = b"".join((*call.parts, data))
            self._settle(number, _Answer(told["status"], headers_of(told["headers"]), body))

    def _settle(self, number: int, answer: _Answer | None) -> None:
        """What the server made of a request, unless nobody waits for it any more."""
        call = self._calls.pop(number, None)
        if call is not None and not call.answer.done():
            call.answer.set_result(answer)

    def _lose(self) -> None:
        """The server has ended."""
        self._is_lost = True
        for number in list(self._calls):
            self._settle(number, _ENDED)
        self.stopped.set()


def _is_last(message: Message) -> bool:
    return message["type"] == "http.request" and not message.get("more_body") and len(message["body"]) <= SMALL


async def _answer(send: Send, answer: _Answer) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})


def _pass_failure(task: asyncio.Task[None], answer: asyncio.Future[_Answer | None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None and not answer.done():
        answer.set_exception(error)


def _told_scope(scope: Scope) -> Told:
    """What JSON can tell of a request's head; `gateway` reads it."""
    return {
        "http_version": scope["http_version"],
        "method": scope["method"],
        "scheme": scope["scheme"],
        "path": scope["path"],
        "raw_path": scope["raw_path"].decode("latin-1"),
        "query_string": scope["query_string"].decode("latin-1"),
        "headers": told_headers(scope["headers"]),
        "client": scope["client"],
        "server": scope["server"],
    }


class _Server(uvicorn.Server):
    """Ends when the server says so, or is gone itself: signals are for the server."""

    def __init__(self, config: uvicorn.Config, relay: Relay, channel: socket.socket) -> None:
        super().__init__(config)
        self._relay = relay
        self._channel = channel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: self._relay.frames, sock=self._channel)
        await super().startup(sockets)
        self._relay.frames.tell({"ready": True})

    async def main_loop(self) -> None:
        ticking = asyncio.ensure_future(super().main_loop())
        await self._relay.stopped.wait()
        self.should_exit = True
        await ticking

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main() -> None:
    """Serve, as standard input says, until the server ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # they were held back until here
    told: dict[str, Any] = json.load(sys.stdin)
    with socket.socket(fileno=told["listening"]) as listening, socket.socket(fileno=told["channel"]) as channel:
        relay = Relay(map_memory(told["memory"]))
        _Server(uvicorn_config(relay, told["seconds"], told["ssl"]), relay, channel).run([listening])
