"""Requests and answers between a front end and the server, both in this process; and where they put them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_trt.core import open_inference as oip
from mlflow_trt.deploy.serve.calls import Calls
from mlflow_trt.deploy.serve.front_ends import memory as memory_module
from mlflow_trt.deploy.serve.front_ends import processes
from mlflow_trt.deploy.serve.front_ends.frames import Frames
from mlflow_trt.deploy.serve.front_ends.front_end import _HEADER_LENGTH, Relay
from mlflow_trt.deploy.serve.front_ends.gateway import Gateway
from mlflow_trt.deploy.serve.front_ends.memory import (
    ANSWER_BYTES,
    REQUEST_BYTES,
    SMALL,
    Blocks,
    create_memory,
    map_memory,
)
from mlflow_trt.deploy.serve.front_ends.processes import FrontEnds
from mlflow_trt.deploy.serve.http import Exchange
from mlflow_trt.deploy.serve.inference import _Watch
from mlflow_trt.deploy.serve.limits import Limits
from mlflow_trt.deploy.serve.problems import DisconnectedError, HttpError
from mlflow_trt.deploy.serve.statistics import Statistics
from mlflow_trt.errors import InputError

PAGE = 4096
WHOLE = {"type": "http.response.start", "status": 200, "headers": []}


class TestBlocks:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 20 * PAGE)), max_size=200))
    def test_no_byte_is_given_out_twice_and_all_come_back(self, steps):
        blocks, taken = Blocks(PAGE, 64 * PAGE), {}
        for takes, size in steps:
            if takes:
                start = blocks.take(size)
                if start is None:
                    continue
                assert start % PAGE == 0
                assert start >= PAGE
                assert start + size <= 65 * PAGE
                assert all(start + max(size, 1) <= other or other + length <= start for other, length in taken.items())
                taken[start] = max(size, 1)
            elif taken:
                blocks.give_back(start := list(taken)[size % len(taken)])
                del taken[start]
        for start in taken:
            blocks.give_back(start)
        assert blocks.take(64 * PAGE) == PAGE
        assert blocks.take(1) is None

    def test_the_lowest_place_comes_first(self):
        """So that few pages are ever touched."""
        blocks = Blocks(0, 16 * PAGE)
        assert [blocks.take(size) for size in (1, PAGE, PAGE + 1, 1)] == [0, PAGE, 2 * PAGE, 4 * PAGE]
        blocks.give_back(PAGE)
        assert blocks.take(2 * PAGE) == 5 * PAGE
        assert blocks.take(1) == PAGE

    def test_a_size_for_which_there_is_no_room(self):
        blocks = Blocks(0, 4 * PAGE)
        assert blocks.take(4 * PAGE + 1) is None
        assert blocks.take(4 * PAGE) == 0


def test_nobody_can_change_the_size_of_the_memory():
    """Or whoever reads it might be ended by a signal."""
    descriptor = create_memory()
    for size in (0, 2 * (REQUEST_BYTES + ANSWER_BYTES)):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


@given(st.lists(st.tuples(st.dictionaries(st.text(max_size=3), st.integers(-9, 9)), st.binary(max_size=30))),
       st.integers(1, 40))  # fmt: skip
def test_frames_come_out_as_they_went_in(told, cut):
    class Wire:
        def is_closing(self):
            return False

        def write(self, data):
            sent.append(data)

    async def send():
        sender = Frames(lambda *_: None, lambda: None)
        sender.connection_made(Wire())
        for each in told:
            sender.tell(*each)
        await asyncio.sleep(0)

    sent, heard = [], []
    asyncio.run(send())
    assert len(sent) == bool(told)  # all at once
    received = b"".join(sent)
    receiver = Frames(lambda *each: heard.append(each), lambda: None)
    for start in range(0, len(received), cut):
        receiver.data_received(received[start : start + cut])
    assert heard == told


def test_what_was_told_when_the_connection_ends_is_not_written():
    """uvloop raises an error then."""

    class Wire:
        has_ended = False

        def is_closing(self):
            return self.has_ended

        def write(self, _data):
            raise AssertionError

    async def send():
        sender = Frames(lambda *_: None, lambda: None)
        sender.connection_made(Wire())
        sender.tell({"free": []})
        Wire.has_ended = True
        sender._send()
        assert not sender._unsent

    asyncio.run(send())


async def until(condition):
    """Wait until it holds, as `wait_for` does for threads."""

    async def look():
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(look(), PATIENCE)


class Client:
    """What uvicorn would be to the relay, for one request."""

    def __init__(self, pair, body=b"", *, chunk=1 << 16, headers=(), length=True, **scope):
        sizes = [(b"content-length", b"%d" % len(body))] if length else []
        self.scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/a b",
            "raw_path": b"/a%20b", "query_string": b"q=1", "headers": [*sizes, *headers],
            "client": ("10.0.0.1", 5), "server": ("127.0.0.1", 80), **scope,
        }  # fmt: skip
        self._chunks = [body[at : at + chunk] for at in range(0, len(body), chunk)] or [b""]
        self._incoming = asyncio.Queue()
        self.asked = 0
        self.status, self.headers, self.body = None, None, b""
        self._pair = pair

    async def receive(self):
        self.asked += 1
        if self._chunks:
            chunk = self._chunks.pop(0)
            await asyncio.sleep(0)
            return {
                "type": "http.request",
                "body": chunk,
                "more_body": bool(self._chunks) or self._incoming.qsize() > 0,
            }
        return await self._incoming.get()

    def leave(self):
        self._chunks.clear()
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.body += message["body"]

    async def ask(self):
        await asyncio.wait_for(self._pair.relay(self.scope, self.receive, self.send), PATIENCE)
        return self.body


class Pair:
    """A front end's relay, and the gateway to the application."""

    def __init__(self, app):
        descriptor = create_memory()
        self.gateway, self.relay = Gateway(app, descriptor), Relay(map_memory(descriptor))
        os.close(descriptor)

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, app):
        pair, loop = cls(app), asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        await loop.create_unix_connection(lambda: pair.gateway.frames, sock=ours)
        await loop.create_unix_connection(lambda: pair.relay.frames, sock=theirs)
        try:
            yield pair
            await until(lambda: pair.relay._blocks._free == [(0, REQUEST_BYTES)])
            await until(lambda: pair.gateway._answers._free == [(REQUEST_BYTES, REQUEST_BYTES + ANSWER_BYTES)])
            assert not pair.gateway._requests
            assert not pair.relay._calls
            assert not pair.gateway._bodies
        finally:
            pair.gateway.frames.close()
            pair.relay.frames.close()
            await pair.gateway.lost


def within(app, use):
    """Use a pair on an event loop of its own."""

    async def run():
        async with Pair.of(app) as pair:
            return await use(pair)

    return asyncio.run(run())


async def body_of(receive):
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        parts.append(message["body"])
        if not message["more_body"]:
            return parts


async def echo(scope, receive, send):
    parts = await body_of(receive)
    await send({**WHOLE, "headers": [(b"parts", b"%d" % len(parts)), (b"x", b"\xff")]})
    await send({"type": "http.response.body", "body": b"".join(bytes(part) for part in parts)})


def reading(ended):
    """An application that reads the body, and notes that its client left before it had come."""

    async def app(_scope, receive, _send):
        try:
            await body_of(receive)
        except ConnectionError:
            ended.append("left")

    return app


def waiting(waits, ended):
    """One that waits for its client to leave, notes what it heard, and answers nobody."""

    async def app(_scope, receive, send):
        await body_of(receive)
        waits.set()
        ended.append((await receive())["type"])
        await send(WHOLE)
        await send({"type": "http.response.body", "body": numbers(1 << 20)})

    return app


def numbers(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


class TestRequests:
    @pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1, 1 << 20, 3_000_001])
    @pytest.mark.parametrize("length", [True, False], ids=["", "chunked"])
    def test_bodies_of_every_size_go_and_come(self, size, length):
        body = numbers(size)

        async def use(pair):
            client = Client(pair, body, length=length)
            assert await client.ask() == body
            parts = -(-size // (1 << 16)) if not length or size <= SMALL else 1
            assert client.headers == [(b"parts", b"%d" % max(1, parts)), (b"x", b"\xff")]
            assert client.status == 200

        within(echo, use)

    @pytest.mark.parametrize("header_length", [0, 1, 15, 16, 177])
    def test_tensors_lie_where_numbers_may(self, header_length):
        """Also where the application would have had to copy the body for it."""
        places = []

        async def look(_scope, receive, send):
            (body,) = await body_of(receive)
            places.append(np.frombuffer(body, np.uint8).ctypes.data + header_length)
            await send(WHOLE)
            await send({"type": "http.response.body", "body": bytes(body)})

        async def use(pair):
            body = numbers(100_000)
            client = Client(pair, body, headers=[(_HEADER_LENGTH, b"%d" % header_length)])
            assert await client.ask() == body

        within(look, use)
        assert [place % 16 for place in places] == [0]

    def test_the_header_that_says_where_tensors_begin_is_the_protocols(self):
        assert oip.HEADER_LENGTH.encode() == _HEADER_LENGTH

    def test_heads_come_as_they_were(self):
        seen = []

        async def app(scope, receive, send):
            seen.append(scope)
            await echo(scope, receive, send)

        async def use(pair):
            client = Client(pair, headers=[(b"x", bytes(range(32, 127)) + b"\xe9\xff")])
            await client.ask()
            assert client.scope.items() <= seen[0].items()

        within(app, use)

    def test_what_has_no_room_goes_over_the_socket(self, monkeypatch):
        for name in ("REQUEST_BYTES", "ANSWER_BYTES"):
            monkeypatch.setattr(memory_module, name, 1 << 20)
        bodies = [numbers(700_000, seed) for seed in range(6)]

        async def use(pair):
            pair.relay._blocks, pair.gateway._answers = Blocks(0, 1 << 20), Blocks(1 << 20, 1 << 20)
            clients = [Client(pair, body) for body in bodies]
            assert await asyncio.gather(*[client.ask() for client in clients]) == bodies
            parts = [int(dict(client.headers)[b"parts"]) for client in clients]
            assert min(parts) == 1
            assert max(parts) > 1
            await until(lambda: pair.relay._blocks._free == [(0, 1 << 20)])
            await until(lambda: pair.gateway._answers._free == [(1 << 20, 2 << 20)])
            pair.relay._blocks = Blocks(0, REQUEST_BYTES)
            pair.gateway._answers = Blocks(REQUEST_BYTES, ANSWER_BYTES)

        within(echo, use)

    def test_an_answer_without_room_lets_others_by(self):
        """It is larger than the memory, and goes over the socket; nobody may wait for it any more."""
        answered, large = [], numbers(ANSWER_BYTES + 5)

        async def app(scope, receive, send):
            (body,) = await body_of(receive)
            await send(WHOLE)
            await send({"type": "http.response.body", "body": bytes(body) or large})

        async def use(pair):
            async def ask(body):
                assert await Client(pair, body).ask() == body or large
                answered.append(len(body))

            leaving = Client(pair)
            asking = asyncio.ensure_future(leaving.ask())
            await until(lambda: pair.relay._calls and pair.relay._calls[0].parts)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await asyncio.gather(*map(ask, (b"", b"1", numbers(100_000))))

        within(app, use)
        assert answered == [1, 100_000, 0]

    def test_many_at_once_get_their_own(self):
        async def slow_echo(scope, receive, send):
            parts = await body_of(receive)
            for _ in range(parts[0][0] % 7):
                await asyncio.sleep(0)
            await send(WHOLE)
            await send({"type": "http.response.body", "body": b"".join(bytes(part) for part in parts)})

        async def use(pair):
            bodies = [numbers(1 + 3_001 * (seed % 40), seed) for seed in range(300)]
            assert await asyncio.gather(*[Client(pair, body).ask() for body in bodies]) == bodies

        within(slow_echo, use)

    @pytest.mark.parametrize("header", [b"content-length", _HEADER_LENGTH])
    def test_numbers_with_more_digits_than_python_reads(self, header):
        """The server refuses them; a front end takes no notice."""

        async def use(pair):
            body = numbers(100_000)
            client = Client(pair, body, headers=[(header, b"0" * 5000 + b"100000")])
            assert await client.ask() == body

        within(echo, use)

    def test_a_client_that_waits_to_be_told_sends_nothing_before(self):
        told = []

        async def refuse(scope, receive, send):
            if scope["query_string"] == b"read":
                await echo(scope, receive, send)
                return
            await send({**WHOLE, "status": 413})
            await send({"type": "http.response.body", "body": b"too large"})

        async def use(pair):
            body = numbers(1 << 17)
            refused = Client(pair, body, headers=[(b"expect", b"100-continue")])
            assert await refused.ask() == b"too large"
            assert refused.asked == 0
            taken = Client(pair, body, headers=[(b"expect", b"100-continue")], query_string=b"read")
            assert await taken.ask() == body
            told.append(taken.asked)

        within(refuse, use)
        assert told[0] >= 2


class TestEnds:
    def test_a_body_stays_as_long_as_something_reads_it(self):
        """A run may last longer than its request, and its rows must not become another one's."""
        kept = []

        async def app(_scope, receive, send):
            (body,) = await body_of(receive)
            kept.append(np.frombuffer(body, np.uint8)[5:])
            await send(WHOLE)
            await send({"type": "http.response.body", "body": b""})

        async def use(pair):
            bodies = [numbers(50_000 + seed, seed) for seed in range(20)]
            for body in bodies:
                await Client(pair, body).ask()
            assert [array.tobytes() for array in kept] == [body[5:] for body in bodies]
            await asyncio.get_running_loop().run_in_executor(None, kept.clear)  # in another thread

        within(app, use)

    @pytest.mark.parametrize("size", [10, 1 << 20])
    def test_a_client_that_goes_away_while_it_sends(self, size):
        ended = []

        async def use(pair):
            client = Client(pair, numbers(size), chunk=1 << 12)
            client.scope["headers"] = [(b"content-length", b"%d" % (2 * size))]
            client._incoming.put_nowait({"type": "http.disconnect"})
            await client.ask()
            assert client.status is None

        within(reading(ended), use)
        assert ended == ["left"]

    def test_a_client_that_goes_away_while_it_waits(self):
        waits, ended = asyncio.Event(), []

        async def use(pair):
            client = Client(pair, numbers(1 << 20))
            asking = asyncio.ensure_future(client.ask())
            await waits.wait()
            client.leave()
            await asking

        within(waiting(waits, ended), use)
        assert ended == ["http.disconnect"]

    @pytest.mark.parametrize("has_front_end", [True, False])
    def test_a_client_that_goes_away_before_its_answer_is_sent(self, has_front_end, messages):
        """Several requests on a connection that ends: uvloop raises errors, which are no failures of the server."""

        async def app(scope, receive, send):
            await body_of(receive)
            exchange = Exchange(scope, receive, send)
            try:
                await exchange.answer_json("too late")
            except DisconnectedError:
                ended.append("left")

        class Closed(Client):
            async def send(self, _message):
                sent.append("tried")
                raise RuntimeError("unable to perform operation on a transport; the handler is closed")

        async def use(pair):
            client = Closed(pair)
            if has_front_end:
                await client.ask()
            else:
                await app(client.scope, client.receive, client.send)

        ended, sent = [], []
        within(app, use)
        assert sent == ["tried"]
        assert ended == ([] if has_front_end else ["left"])
        assert not messages.text

    def test_an_answer_before_the_body_was_read(self):
        async def refuse(_scope, _receive, send):
            await send({**WHOLE, "status": 413})
            await send({"type": "http.response.body", "body": b"too large"})

        async def use(pair):
            client = Client(pair, numbers(30 << 20))
            assert await client.ask() == b"too large"
            assert client.status == 413
            assert client.asked < 400

        within(refuse, use)

    def test_an_application_that_fails_harms_nobody_else(self, messages):
        async def app(scope, receive, send):
            if scope["query_string"] == b"fail":
                raise RuntimeError("as it was asked to")
            await echo(scope, receive, send)

        async def use(pair):
            failing = Client(pair, numbers(1 << 18), query_string=b"fail")
            well = Client(pair, numbers(1 << 18))
            await asyncio.gather(failing.ask(), well.ask())
            assert failing.status is None
            assert well.body == numbers(1 << 18)

        within(app, use)
        assert "as it was asked to" in messages.text

    def test_a_body_that_is_refused_goes_before_the_garbage_collector_comes(self):
        """Large ones are few objects, so it may take its time."""
        calls = Calls(Limits(), None, print)
        model = SimpleNamespace(users=0, release=lambda: None, statistics=Statistics())

        async def refuse(exchange, _model, ticket, _deadline):
            body = await exchange.read(ticket)
            raise InputError(f"{len(body)} bytes")

        async def app(scope, receive, send):
            exchange = Exchange(scope, receive, send)
            try:
                await calls._guarded(refuse, exchange, model)
            except HttpError as error:
                await exchange.answer_error(error)

        async def use(pair):
            gc.disable()
            try:
                assert await Client(pair, numbers(1 << 18)).ask() == b'{"error":"262144 bytes"}'
                assert not pair.gateway._bodies
            finally:
                gc.enable()

        within(app, use)
        calls.close()

    def test_a_request_that_was_watched_goes_before_the_garbage_collector_comes(self):
        """And with it the memory of a front end that ended meanwhile."""

        async def use():
            async def receive():
                await asyncio.Event().wait()

            loop = asyncio.get_running_loop()
            watch = _Watch(loop, Exchange({"headers": []}, receive, receive), loop.create_future())
            watch._begin()
            await asyncio.sleep(0)
            known = weakref.ref(receive)
            watch.stop()
            del watch, receive
            for _ in range(3):
                await asyncio.sleep(0)
            assert known() is None

        gc.disable()
        try:
            asyncio.run(use())
        finally:
            gc.enable()

    @pytest.mark.parametrize("size", [10, 1 << 18])
    def test_an_answer_that_is_none_ends_its_request(self, size, messages):
        """As does an application that is cancelled. Clients would wait for ever."""

        async def app(scope, receive, send):
            await body_of(receive)
            if scope["query_string"] == b"cancel":
                raise asyncio.CancelledError
            await send({**WHOLE, "status": object()})
            await send({"type": "http.response.body", "body": b""})

        async def use(pair):
            for query in (b"cancel", b""):
                client = Client(pair, numbers(size), query_string=query)
                await client.ask()
                assert client.status is None

        within(app, use)
        assert "not JSON serializable" in messages.text

    def test_a_request_that_cannot_be_read_is_given_up(self):
        """And the server works on it no longer."""
        ended = []

        async def fail():
            raise RuntimeError("no more")

        async def use(pair):
            client = Client(pair, numbers(1 << 18))
            client._chunks.pop()
            client._incoming.put_nowait({})
            client._incoming.get = fail
            with pytest.raises(RuntimeError, match="no more"):
                await client.ask()

        within(reading(ended), use)
        assert ended == ["left"]

    def test_a_front_end_that_is_no_more_lets_its_requests_end(self):
        waits, ended = asyncio.Event(), []

        async def use():
            async with Pair.of(waiting(waits, ended)) as pair:
                asking = asyncio.ensure_future(Client(pair, numbers(1 << 20)).ask())
                await waits.wait()
                pair.relay.frames.close()
                await pair.gateway.lost
                await until(lambda: not pair.gateway._requests)
                assert await asking == b'{"error":"the server has ended"}'
                later = Client(pair)
                assert await later.ask() == b'{"error":"the server has ended"}'
                assert later.status == 503
                pair.relay._blocks = Blocks(0, REQUEST_BYTES)
                pair.gateway._answers = Blocks(REQUEST_BYTES, ANSWER_BYTES)

        asyncio.run(use())
        assert ended == ["http.disconnect"]


def maps_of_memory():
    return Path("/proc/self/maps").read_text().count("mlflow-trt-front-end")


class TestProcesses:
    """Front ends as processes, whose server is this one."""

    @contextlib.asynccontextmanager
    async def started(self, lost, seconds=PATIENCE):
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        front_ends = FrontEnds(echo, [listening], seconds=seconds, ssl={}, lose=lost.append)
        self.port = listening.getsockname()[1]
        await front_ends.start()
        try:
            yield front_ends
        finally:
            await asyncio.wait_for(front_ends.stop(lambda: True), PATIENCE)

    async def ask(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: 4\r\nConnection: close\r\n\r\n1234")
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        return answer

    def test_one_takes_the_place_of_another_and_of_its_memory(self):
        lost = []

        async def use():
            async with self.started(lost) as front_ends:
                gc.collect()
                before = maps_of_memory()
                gc.disable()  # memory is not to wait for it
                for is_ready in (True, False, True):
                    (process,) = front_ends._running.values()
                    assert os.getsid(process.pid) == process.pid  # no terminal asks for a password, or sends Ctrl-C
                    process.kill()
                    await until(lambda ended=process: list(front_ends._running.values()) not in ([], [ended]))
                    if is_ready:  # if not, the next one is killed while it starts
                        assert (await self.ask()).startswith(b"HTTP/1.1 200 OK")
                        await until(lambda: maps_of_memory() == before)

        try:
            asyncio.run(use())
        finally:
            gc.enable()
        assert not lost

    def test_one_that_was_stopped_is_replaced(self, monkeypatch):
        """The kernel goes on to give it connections, which nobody would answer."""
        monkeypatch.setattr(processes, "_ASKS", 1e6)  # the test asks
        lost = []

        async def use():
            async with self.started(lost) as front_ends:
                ((gateway, process),) = front_ends._running.items()
                for _ in range(2 * processes._MOST_UNANSWERED):
                    front_ends.ask_whether_they_run()
                    await until(lambda: not gateway._unanswered)  # it answers
                process.send_signal(signal.SIGSTOP)
                for _ in range(processes._MOST_UNANSWERED + 1):
                    assert process.poll() is None
                    front_ends.ask_whether_they_run()
                await until(lambda: list(front_ends._running.values()) not in ([], [process]))
                assert process.returncode == -signal.SIGKILL
                assert (await self.ask()).startswith(b"HTTP/1.1 200 OK")

        asyncio.run(use())
        assert not lost

    @pytest.mark.parametrize("is_urgent", [True, False])
    def test_one_that_hangs_does_not_keep_the_server(self, is_urgent, monkeypatch):
        monkeypatch.setattr(processes, "_PATIENCE", 0.01)

        async def use():
            async with self.started([], seconds=0.01) as front_ends:
                ((gateway, process),) = front_ends._running.items()
                process.send_signal(signal.SIGSTOP)
                gateway.frames.tell({"free": []}, bytes(1 << 24))  # which it does not read
                await asyncio.wait_for(front_ends.stop(lambda: is_urgent), PATIENCE)
                assert process.returncode == -signal.SIGKILL

        asyncio.run(use())

    def test_one_that_was_stopped_does_not_keep_a_server_that_ends(self, monkeypatch):
        monkeypatch.setattr(processes, "_ASKS", 1e6)  # the test asks

        async def use():
            async with self.started([], seconds=1e6) as front_ends:
                (process,) = front_ends._running.values()
                process.send_signal(signal.SIGSTOP)
                stopping = asyncio.ensure_future(front_ends.stop(lambda: False))
                for _ in range(processes._MOST_UNANSWERED + 1):
                    assert process.poll() is None
                    front_ends.ask_whether_they_run()
                await asyncio.wait_for(stopping, PATIENCE)
                assert process.returncode == -signal.SIGKILL

        asyncio.run(use())

    @pytest.mark.parametrize(
        ("owner", "name", "value", "reason"),
        [
            (sys, "executable", "/nowhere/python", "a front end cannot be started: [Errno 2] No such file"),
            (processes, "_FRONT_END", "raise SystemExit(3)", "a front end ended with status 3 when it was started, 3"),
        ],
    )
    def test_one_that_cannot_be_replaced_ends_the_server(self, owner, name, value, reason, monkeypatch):
        """Its socket would go on to take connections that nobody answers."""
        lost = []

        async def use():
            async with self.started(lost) as front_ends:
                monkeypatch.setattr(owner, name, value)
                (process,) = front_ends._running.values()
                process.kill()
                await until(lambda: lost)

        asyncio.run(use())
        assert reason in lost[0]

    def test_one_that_cannot_start(self, monkeypatch):
        monkeypatch.setattr(processes, "_FRONT_END", "import sys; sys.exit(3)")
        lost = []

        async def use():
            async with self.started(lost):
                pass

        with pytest.raises(RuntimeError, match="a front end ended when it was started"):
            asyncio.run(use())
        assert not lost
