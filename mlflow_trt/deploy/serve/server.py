"""`mlflow-trt serve`: load models, listen, answer, end gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.backends.nvml import gpu_memory
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scoring_server import become_server, explain_crashes
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.deploy.serve.limits import Limits
from mlflow_trt.deploy.serve.listening import bind, listen, occupy_standard_streams
from mlflow_trt.deploy.serve.model_source import ModelSource, resolve_source
from mlflow_trt.errors import MissingDependencyError, OptionError

try:
    import httptools as _httptools
    import uvicorn
    import uvloop as _uvloop

    from mlflow_trt.deploy.serve.access_log import AccessLog
    from mlflow_trt.deploy.serve.app import UNTRACED, App
    from mlflow_trt.deploy.serve.follow import AliasFollower
    from mlflow_trt.deploy.serve.front_ends.processes import FrontEnds
    from mlflow_trt.deploy.serve.keys import read_keys
    from mlflow_trt.deploy.serve.repository import ModelRepository
    from mlflow_trt.deploy.serve.served_model import ServedModel, load_served_model
    from mlflow_trt.deploy.serve.shared_memory import SharedMemory
    from mlflow_trt.deploy.serve.uvicorn_config import Application, Receive, Scope, Send, uvicorn_config
except ImportError as error:
    raise MissingDependencyError(
        f"{error.name} is not installed: `pip install 'mlflow-trt[serve]'`", packages=(str(error.name),)
    ) from error

_MOST_FRONT_ENDS = 64
_USED = (_httptools, _uvloop)  # uvicorn imports them by name: missing ones are missed here
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How models are served.

    Args:
        host: the address to listen on.
        port: the port; 0 for a free one.
        reuse_port: let several servers listen on one port, such as one for each GPU: the kernel shares out connections.
        front_ends: processes that speak HTTP for the one that has the models; 0 lets it do so itself.
        settings: load settings, for all models.
        follow_aliases: seconds between two looks where aliases lead; 0 for never.
        limits: what is refused.
        drain_seconds: how long the server goes on when it is asked to end, while it says that it is not ready.
        api_key_file: a file with keys, one a line, of which each request has to bring one.
        shared_memory_prefix: what the names of shared memory begin with that clients may register; None for none.
        access_log: print a line of JSON for each request.
        tracing: by OpenTelemetry's ASGI instrumentation, which has to be installed.
        ssl_keyfile, ssl_certfile, ssl_keyfile_password: as uvicorn has them.
        ssl_ca_certs: who has to have signed the certificate that each client brings, probes, too; None asks for none.

    Raises:
        OptionError: an option makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    reuse_port: bool = False
    front_ends: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    follow_aliases: float = 0.0
    limits: Limits = field(default_factory=Limits)
    drain_seconds: float = 0.0
    api_key_file: Path | None = None
    shared_memory_prefix: str | None = None
    access_log: bool = False
    tracing: bool = False
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: Path | None = None

    def __post_init__(self) -> None:
        LoadSettings.of(self.settings)
        if not 0 <= self.port < 1 << 16:
            raise OptionError(f"port is {self.port}; expected 0 to 65535", option="port")
        if not 0 <= self.front_ends <= _MOST_FRONT_ENDS:
            raise OptionError(
                f"front_ends is {self.front_ends}; expected 0 to {_MOST_FRONT_ENDS} processes", option="front_ends"
            )
        if self.front_ends and not hasattr(os, "memfd_create"):
            raise OptionError("front_ends needs memory that processes share as Linux has it", option="front_ends")
        for option in ("follow_aliases", "drain_seconds"):
            if not 0 <= getattr(self, option) < float("inf"):
                raise OptionError(f"{option} is {getattr(self, option)}; expected seconds, 0 or more", option=option)
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise OptionError("ssl_ca_certs is for HTTPS, which ssl_certfile makes it", option="ssl_ca_certs")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise OptionError("give both of ssl_keyfile and ssl_certfile, or none", option="ssl_keyfile")
        for option in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, option)
            if path is not None and not path.is_file():
                raise OptionError(f"{option}: {path} is no file", option=option)

    @property
    def ssl(self) -> dict[str, str | None]:
        """What uvicorn is told of HTTPS; nothing for HTTP."""
        if self.ssl_certfile is None:
            return {}
        return {
            "ssl_keyfile": str(self.ssl_keyfile),
            "ssl_certfile": str(self.ssl_certfile),
            "ssl_keyfile_password": self.ssl_keyfile_password,
            "ssl_ca_certs": str(self.ssl_ca_certs) if self.ssl_ca_certs else None,
        }


Load = Callable[[ModelSource, Mapping[str, Any]], ServedModel]


def serve(
    models: Sequence[str], options: ServeOptions, told: Callable[[str], None], load: Load = load_served_model
) -> bool:
    """Serve until a signal asks to end; True where it did, False where the GPU was lost.

    Args:
        models: URIs of MLflow, or folders, each perhaps after `NAME=`.
        options: how.
        told: what is said to whoever started it.
        load: how a model is loaded; for tests.

    Raises:
        OptionError: what is asked for makes no sense; and what loading a model raises.
        OSError: nothing can listen there.
    """
    occupy_standard_streams()
    become_server("start the server with --model-config")
    explain_crashes()
    keys = read_keys(options.api_key_file) if options.api_key_file is not None else ()
    regions = SharedMemory(options.shared_memory_prefix) if options.shared_memory_prefix is not None else None
    traced = _tracing() if options.tracing else None
    sources = [resolve_source(model) for model in models]
    if options.follow_aliases and not any(source.alias for source in sources):
        raise OptionError("follow_aliases follows models like models:/NAME@ALIAS, and none is", option="follow_aliases")
    with contextlib.ExitStack() as stack:
        bound_to = bind(
            options.host,
            options.port,
            options.front_ends,
            reuse_port=options.reuse_port,
            seconds=options.limits.seconds,
        )
        sockets = [stack.enter_context(bound) for bound in bound_to]
        repository = _load(sources, load, options.settings, stack, told)
        gpus = probe().gpus if any(model.session.runtime == "tensorrt" for model in repository) else ()
        app = App(
            repository,
            limits=options.limits,
            api_keys=keys,
            regions=regions,
            access_log=AccessLog(sys.stdout) if options.access_log else None,
            gpu_memory=lambda: gpu_memory(gpus),
        )
        stack.pop_all()
        for bound in sockets:
            stack.enter_context(bound)
        stack.callback(app.close)
        follower = None
        if options.follow_aliases:
            follower = AliasFollower(repository, lambda source: load(source, options.settings), options.follow_aliases)
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{'https' if options.ssl else 'http'}://{host}:{sockets[0].getsockname()[1]}"
        asgi = app if traced is None else traced(app)
        front_ends = None
        if options.front_ends:
            listen(sockets, options.host, reuse_port=options.reuse_port)
            front_ends = FrontEnds(asgi, sockets, seconds=options.limits.seconds, ssl=options.ssl, lose=app.lose)
        config = uvicorn_config(asgi, options.limits.seconds, {} if front_ends is not None else options.ssl)
        server = _Server(config, app, follower, front_ends, options.drain_seconds)
        server.ready = lambda: told(f"Serving at {address}")
        server.run([] if front_ends is not None else sockets)
        return app.lost is None


def _load(
    sources: Sequence[ModelSource],
    load: Load,
    settings: Mapping[str, Any],
    stack: contextlib.ExitStack,
    told: Callable[[str], None],
) -> ModelRepository:
    """The models, one after the other. Where one cannot be loaded, those before it are closed."""
    loaded: list[ServedModel] = []
    for source in sources:
        model = load(source, settings)
        stack.callback(model.close)
        loaded.append(model)
        told(str(model))
    return ModelRepository(loaded)


class _Server(uvicorn.Server):
    """Drains before it ends, and follows aliases while it runs."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: App,
        follower: AliasFollower | None,
        front_ends: FrontEnds | None,
        drain_seconds: float,
    ) -> None:
        super().__init__(config)
        self._app = app
        self._follower = follower
        self._front_ends = front_ends
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._front_ends is not None:
            await self._front_ends.start()
        self._following = asyncio.ensure_future(self._follower.follow()) if self._follower is not None else None
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._following is not None:
            self._following.cancel()
        if self._front_ends is not None:
            await self._front_ends.stop(lambda: self.force_exit)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGHUP, too: a terminal that is closed sends it. Ignored, as nohup leaves it, it stays so."""
        with super().capture_signals():
            before = signal.getsignal(signal.SIGHUP)
            is_heard = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
            if is_heard:
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                if is_heard:
                    signal.signal(signal.SIGHUP, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets it drain, unless nothing can be answered any more; the next one ends it."""
        if self._app.draining or not self._drain_seconds or self._app.lost is not None or self._loop is None:
            self._app.draining = True
            super().handle_exit(sig, frame)
            return
        self._app.draining = True
        self._loop.call_soon_threadsafe(
            lambda: asyncio.get_running_loop().call_later(
                self._drain_seconds, super(_Server, self).handle_exit, sig, frame
            )
        )


def _tracing() -> Callable[[App], Application]:
    try:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    except ImportError as error:
        raise MissingDependencyError(
            "opentelemetry-instrumentation-asgi is not installed: `pip install 'mlflow-trt[tracing]'`",
            packages=("opentelemetry-instrumentation-asgi",),
        ) from error

    def traced(app: App) -> Application:
        """Not by the middleware's own choice, which searches host and path: it would leave out a model `shipping`."""
        tracing: Application = OpenTelemetryMiddleware(app)

        async def choose(scope: Scope, receive: Receive, send: Send) -> None:
            await (app if scope["path"] in UNTRACED else tracing)(scope, receive, send)

        return choose

    return traced
