"""Front ends as processes: started, started again where one ends or hangs, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from mlflow_trt.core.log import get_logger
from mlflow_trt.deploy.serve.front_ends import SIGNALS
from mlflow_trt.deploy.serve.front_ends.gateway import Gateway
from mlflow_trt.deploy.serve.front_ends.memory import create_memory
from mlflow_trt.deploy.serve.uvicorn_config import Application

_FRONT_END = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from mlflow_trt.deploy.serve.front_ends.front_end import main
main()
"""
_LOOKS = 0.05  # seconds between two looks whether front ends are to end at once
_PATIENCE = 5.0  # seconds for what a front end does without waiting for clients
_ASKS = 5.0  # seconds between two questions whether front ends run
_MOST_UNANSWERED = 6  # one after the other: counted, since a machine that slept has answered none in all that time
_MOST_FAILED = 3  # front ends that end when they are started, one after the other: whoever kills may hit one
_log = get_logger(__name__)


class FrontEnds:
    """Front ends of a server, one for each socket.

    Args:
        app: the server's application.
        sockets: where they listen. All are bound to one address, and stay open while one front end takes the place of
            another, so that no connection is refused.
        seconds: for a request.
        ssl: as `uvicorn_config` has it.
        lose: told why there can be no front ends.
    """

    def __init__(
        self,
        app: Application,
        sockets: Sequence[socket.socket],
        *,
        seconds: float,
        ssl: Mapping[str, str | None],
        lose: Callable[[str], None],
    ) -> None:
        self._app = app
        self._sockets = sockets
        self._seconds = seconds
        self._ssl = dict(ssl)
        self._lose = lose
        self._running: dict[Gateway, subprocess.Popen[bytes]] = {}
        self._keeping: list[asyncio.Task[None]] = []
        self._asking: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Return when all of them take requests. Raises RuntimeError where one ends instead."""
        try:
            first = [await self._begin(listening) for listening in self._sockets]
            for gateway in first:
                await _started(gateway)
        except BaseException:
            await self.stop(lambda: True)
            raise
        for listening, gateway in zip(self._sockets, first, strict=True):
            self._keeping.append(asyncio.ensure_future(self._keep(listening, gateway)))
        self._asking = asyncio.ensure_future(self._keep_asking())

    async def stop(self, is_urgent: Callable[[], bool]) -> None:
        """Let them answer the requests that they have, and end; at once where that is urgent, or they hang."""
        self._stopping = True
        for listening in self._sockets:
            listening.close()  # or connections would still be taken, and never answered
        for gateway in self._running:
            gateway.frames.tell({"stop": True})
        loop = asyncio.get_running_loop()
        until = loop.time() + self._seconds + _PATIENCE
        while loop.time() < until and not is_urgent() and not all(gateway.lost.done() for gateway in self._running):
            await asyncio.sleep(_LOOKS)
        if self._asking is not None:
            self._asking.cancel()
        for gateway in list(self._running):
            await self._end(gateway)
        await asyncio.gather(*self._keeping)

    async def _keep_asking(self) -> None:
        while True:
            await asyncio.sleep(_ASKS)
            self.ask_whether_they_run()

    def ask_whether_they_run(self) -> None:
        """Kill a front end that was stopped, or hangs: the kernel goes on to give it connections."""
        for gateway, process in self._running.items():
            runs = gateway.ready.done() and not gateway.lost.done()
            if runs and gateway.ask_whether_it_runs() > _MOST_UNANSWERED:
                _log.error("A front end has answered nothing for %g seconds", _ASKS * _MOST_UNANSWERED)
                process.kill()

    async def _keep(self, listening: socket.socket, gateway: Gateway) -> None:
        """Put another front end in the place of one that ends."""
        failed = 0
        while True:
            await gateway.lost
            if self._stopping:
                return
            status = await self._end(gateway)
            if self._stopping:
                return
            failed = 0 if gateway.ready.done() else failed + 1
            if failed == _MOST_FAILED:
                self._lose(f"a front end ended with status {status} when it was started, {failed} times")
                return
            _log.error("A front end ended with status %d; another one takes its place", status)
            try:
                gateway = await self._begin(listening)
            except OSError as error:
                self._lose(f"a front end cannot be started: {error}")
                return
            if self._stopping:
                gateway.frames.tell({"stop": True})  # `stop` came too early for it, and ends it
                return

    async def _begin(self, listening: socket.socket) -> Gateway:
        memory = create_memory()
        ours, theirs = socket.socketpair()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for the front end, until it ignores them
        try:
            gateway = Gateway(self._app, memory)
            passed = {"listening": listening.fileno(), "channel": theirs.fileno(), "memory": memory}
            process = subprocess.Popen(  # noqa: S603  # this interpreter, with our own module
                [sys.executable, "-I", "-c", _FRONT_END, json.dumps([entry for entry in sys.path if entry])],
                stdin=subprocess.PIPE,
                pass_fds=list(passed.values()),
                start_new_session=True,  # without a terminal, where OpenSSL would ask each of them for a password
            )
            assert process.stdin is not None  # noqa: S101  # for the type checker
            with contextlib.suppress(BrokenPipeError), process.stdin as told:  # `lost` tells of one that has ended
                told.write(json.dumps({**passed, "seconds": self._seconds, "ssl": self._ssl}).encode())
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            os.close(memory)
        self._running[gateway] = process
        await asyncio.get_running_loop().create_unix_connection(lambda: gateway.frames, sock=ours)
        return gateway

    async def _end(self, gateway: Gateway) -> int:
        """See to it that a front end is no more; returns its status."""
        process = self._running.pop(gateway)
        if not gateway.lost.done():
            process.kill()  # first: the connection closes after what a front end that hangs would have to read
            gateway.frames.close()
        status = await asyncio.get_running_loop().run_in_executor(None, _wait, process)
        await gateway.lost
        return status


async def _started(gateway: Gateway) -> None:
    await asyncio.wait((gateway.ready, gateway.lost), return_when=asyncio.FIRST_COMPLETED)
    if not gateway.ready.done():
        raise RuntimeError("a front end ended when it was started; what it printed says why")


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return its status when it has ended, which it does soon."""
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
