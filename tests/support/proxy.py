"""A proxy before MLflow's server that holds back, loses or refuses answers when a test says so."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SECONDS = 60
"""For a test that waits for what does not come."""

_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class Held:
    """Requests that are held back, from when `arrived` is set until the test sets `released`.

    With `answers`, it is the answer that is held back: the server has done what was asked. Only the first is held.
    """

    matches: Callable[[str, str], bool]
    answers: bool = True
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    delivered: threading.Event = field(default_factory=threading.Event)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Who asked may be gone: tests kill it."""


class Proxy:
    """Passes requests on to `target`, and keeps a list of them.

    Attributes:
        address: where it listens.
        requests: (method, path) of each request so far.
        fault: called with (method, path) of each request; `"refuse"` answers 500 without passing it on, `"lose"` passes
            it on and answers 500, `"drop"` passes it on and closes the connection, `"signal"` passes it on and calls
            `before_answer`, None passes it on.
        before_answer: see there.
    """

    def __init__(self, target: str) -> None:
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.before_answer: Callable[[], None] = lambda: None
        self._held: list[Held] = []
        self._holding: list[Held] = []
        self._has_stopped = False
        self._target = urlsplit(target).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or the body, written after the headers, would wait 40 ms for their receipt

            def do_GET(self) -> None:
                proxy._serve(self)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        # It looks whether it is to end that often, in seconds.
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()

    def hold(self, method: str, end: str, *, answers: bool = True) -> Held:
        """Hold back the next request, or its answer, of this method whose path ends so."""
        held = Held(lambda m, path: m == method and path.endswith(end), answers)
        self._held.append(held)
        return held

    def stop(self) -> None:
        """Requests that are still held back are never passed on: others may use the server by now."""
        self._has_stopped = True
        for held in (*self._held, *self._holding):
            held.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        method, path = handler.command, handler.path.split("?")[0]
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.requests.append((method, path))
        held = next((held for held in self._held if held.matches(method, path)), None)
        if held is not None:
            self._held.remove(held)
            self._holding.append(held)
            if not held.answers:
                held.arrived.set()
                if not held.released.wait(SECONDS) or self._has_stopped:
                    handler.close_connection = True
                    return
        fault = self.fault(method, path)
        status, headers, content = (500, {}, b"{}") if fault == "refuse" else self._passed_on(handler, body)
        if fault == "lose":
            status, headers, content = 500, {}, b"{}"
        if fault == "signal":
            self.before_answer()
        if held is not None and held.answers:
            held.arrived.set()
            held.released.wait(SECONDS)
        with contextlib.suppress(OSError):  # whoever asked may be gone
            if fault == "drop":
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        if held is not None:
            held.delivered.set()

    def _passed_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self._target, timeout=SECONDS)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "host"}
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            return 502, {}, b"{}"
        else:
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
            return answer.status, kept, content
        finally:
            connection.close()


@contextlib.contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.stop()
