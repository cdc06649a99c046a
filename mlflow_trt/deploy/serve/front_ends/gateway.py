"""The server's end of the connection to a front end: its requests, as ASGI has them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import weakref
from functools import partial

import numpy as np

from mlflow_trt.core.arrays import Array
from mlflow_trt.core.log import get_logger
from mlflow_trt.deploy.serve.front_ends.frames import Frames, Told, headers_of, told_headers
from mlflow_trt.deploy.serve.front_ends.memory import ANSWER_BYTES, REQUEST_BYTES, SMALL, Blocks, map_memory
from mlflow_trt.deploy.serve.uvicorn_config import Application, Message, Scope

_PIECE = 1 << 20
_log = get_logger(__name__)


class Gateway:
    """Lets an ASGI application answer what a front end reads.

    Args:
        app: the application.
        memory: the file descriptor of what both map.

    Attributes:
        frames: the connection to the front end.
        ready: done when the front end takes requests.
        lost: done when it is gone.
    """

    def __init__(self, app: Application, memory: int) -> None:
        self._app = app
        self._memory = map_memory(memory)
        self._answers = Blocks(REQUEST_BYTES, ANSWER_BYTES)
        self._requests: dict[int, _Request] = {}
        self._bodies: dict[int, weakref.ref[Array]] = {}  # by their block
        self._read: collections.deque[int] = collections.deque()  # blocks of bodies that nobody reads any more
        self._unanswered = 0
        self._thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.frames = Frames(self._hear, self._lose)

    def ask_whether_it_runs(self) -> int:
        """How many times this was asked since it last told anything."""
        self._unanswered += 1
        self.frames.tell({"alive": True})
        return self._unanswered

    def _hear(self, told: Told, data: bytes) -> None:
        self._unanswered = 0
        if "begin" in told:
            number = told["begin"]
            request = self._requests[number] = _Request(self, number, told["scope"])
            if "whole" in told:
                request.put({"type": "http.request", "body": data, "more_body": False})
            request.task = self._loop.create_task(self._answer(request))
        elif "body" in told:
            body = self._body(told["block"], told["at"], told["size"]) if "block" in told else data
            if (waiting := self._requests.get(told["body"])) is not None:
                waiting.put({"type": "http.request", "body": body, "more_body": told["more"]})
            del body
            self._give_back()
        elif "gone" in told:
            if (waiting := self._requests.get(told["gone"])) is not None:
                waiting.leave()
        elif "free" in told:
            self._answers.give_back(told["free"])
        elif "ready" in told:
            self.ready.set_result(None)

    async def _answer(self, request: _Request) -> None:
        try:
            await self._app(request.scope, request.receive, request.send)
        except Exception:  # noqa: BLE001  # the front end is told, and the others go on
            _log.exception("A request failed")
        finally:
            del self._requests[request.number]
            if not request.is_answered:
                self.frames.tell({"call": request.number, "ended": True})
            request.forget()
            self._give_back()

    async def answer(self, number: int, start: Message, body: bytes) -> None:
        """Send an answer to the front end: what has no room in pieces, between which others are told."""
        told: Told = {"call": number, "status": start["status"], "headers": told_headers(start["headers"])}
        block = self._answers.take(len(body)) if len(body) > SMALL else None
        if block is None:
            left = memoryview(body)
            while len(left) > _PIECE:
                self.frames.tell({"call": number, "part": True}, left[:_PIECE])
                left = left[_PIECE:]
                await self.frames.drain()
            self.frames.tell(told, left)
            return
        self._memory[block : block + len(body)] = body
        self.frames.tell({**told, "at": block, "size": len(body)})

    def _body(self, block: int, at: int, size: int) -> memoryview:
        """A body where the front end put it, which has the place back when nothing refers to it any more: a run may
        last longer than the request that it is for.
        """
        array = np.frombuffer(self._memory, np.uint8, size, at)
        self._bodies[block] = weakref.ref(array, partial(self._note_read, block))
        return array.data

    def _note_read(self, block: int, _array: object) -> None:
        """In the thread that was the last to refer to the body."""
        del self._bodies[block]
        self._read.append(block)
        if threading.get_ident() != self._thread:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and so does the front end
                self._loop.call_soon_threadsafe(self._give_back)

    def _give_back(self) -> None:
        if self._read:
            blocks = [self._read.popleft() for _ in range(len(self._read))]
            self.frames.tell({"free": blocks})

    def _lose(self) -> None:
        for request in self._requests.values():
            request.leave()
        if not self.lost.done():  # cancelled with who waited for it
            self.lost.set_result(None)


class _Request:
    """One request as the application sees it."""

    def __init__(self, gateway: Gateway, number: int, told: Told) -> None:
        self.number = number
        self.scope: Scope = _scope(told)
        self.is_answered = False
        self.task: asyncio.Task[None] | None = None  # the event loop alone would not keep it
        self._gateway = gateway
        self._messages: collections.deque[Message] = collections.deque()
        self._has_left = False
        self._waiting: asyncio.Future[None] | None = None
        self._start: Message = {}
        self._parts: list[bytes] = []
        self._asks_for_body = any(name == b"expect" for name, _ in self.scope["headers"])

    def put(self, message: Message) -> None:
        self._messages.append(message)
        self._wake()

    def leave(self) -> None:
        """Its client is gone."""
        self._has_left = True
        self._wake()

    def forget(self) -> None:
        """What came and was not read."""
        self._messages.clear()

    async def receive(self) -> Message:
        """As ASGI has it."""
        if self._asks_for_body:
            self._asks_for_body = False
            self._gateway.frames.tell({"call": self.number, "wanted": True})
        while not self._messages and not self._has_left:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._messages.popleft() if self._messages else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """As ASGI has it."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._parts.append(message.get("body", b""))
        if not message.get("more_body") and not self.is_answered:
            await self._gateway.answer(self.number, self._start, b"".join(self._parts))
            self.is_answered = True

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def _scope(told: Told) -> Scope:
    """A request's head, as `front_end` told it."""
    return {
        **told,
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "root_path": "",
        "raw_path": told["raw_path"].encode("latin-1"),
        "query_string": told["query_string"].encode("latin-1"),
        "headers": headers_of(told["headers"]),
        "client": _address(told["client"]),
        "server": _address(told["server"]),
    }


def _address(told: list[str | int] | None) -> tuple[str | int, ...] | None:
    return tuple(told) if told is not None else None
