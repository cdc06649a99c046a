"""`mlflow-trt serve`: load models, listen, answer, end gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mlflow_trt.backends.cuda_driver import probe
from mlflow_trt.backends.nvml import gpu_memory
from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scoring_server import explain_crashes
from mlflow_trt.core.settings import LoadSettings
from mlflow_trt.deploy.serve.limits import Limits
from mlflow_trt.deploy.serve.model_source import ModelSource, resolve_source
from mlflow_trt.errors import MissingDependencyError, OptionError

try:
    import httptools as _httptools
    import uvicorn
    import uvloop as _uvloop

    from mlflow_trt.deploy.serve.access_log import AccessLog
    from mlflow_trt.deploy.serve.app import App
    from mlflow_trt.deploy.serve.follow import AliasFollower
    from mlflow_trt.deploy.serve.keys import read_keys
    from mlflow_trt.deploy.serve.repository import ModelRepository
    from mlflow_trt.deploy.serve.served_model import ServedModel, load_served_model
    from mlflow_trt.deploy.serve.shared_memory import SharedMemory
except ImportError as error:
    raise MissingDependencyError(
        f"{error.name} is not installed: `pip install 'mlflow-trt[serve]'`", packages=(str(error.name),)
    ) from error

_IN_SERVER = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
_KEEP_ALIVE = 75
_USED = (_httptools, _uvloop)  # uvicorn imports them by name: missing ones are missed here
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How models are served.

    Args:
        host: the address to listen on.
        port: the port; 0 for a free one.
        reuse_port: let several servers listen on one port, such as one for each GPU: the kernel shares out connections.
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
    os.environ[_IN_SERVER] = "true"  # what is different in a server is so here: warming up, ending with the GPU
    explain_crashes()
    keys = read_keys(options.api_key_file) if options.api_key_file is not None else ()
    regions = SharedMemory(options.shared_memory_prefix) if options.shared_memory_prefix is not None else None
    traced = _tracing() if options.tracing else None
    sources = [resolve_source(model) for model in models]
    if options.follow_aliases and not any(source.alias for source in sources):
        raise OptionError("follow_aliases follows models like models:/NAME@ALIAS, and none is", option="follow_aliases")
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_bound_socket(options))
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
        stack.enter_context(listening)
        stack.callback(app.close)
        follower = None
        if options.follow_aliases:
            follower = AliasFollower(repository, lambda source: load(source, options.settings), options.follow_aliases)
        address = f"{'https' if options.ssl_certfile else 'http'}://{options.host}:{listening.getsockname()[1]}"
        server = _Server(_config(app if traced is None else traced(app), options), app, follower, options.drain_seconds)
        server.ready = lambda: told(f"Serving at {address}")
        server.run([listening])
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


def _bound_socket(options: ServeOptions) -> socket.socket:
    """Taken before models are loaded, which may last minutes, and open for connections after."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if options.reuse_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((options.host, options.port))
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen on {options.host}:{options.port}: {error.strerror}") from error
    return listening


def _config(app: Any, options: ServeOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(options.limits.seconds) + 1,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile_password=options.ssl_keyfile_password,
        ssl_ca_certs=str(options.ssl_ca_certs) if options.ssl_ca_certs else None,
        # Without it, the certificates of clients would not be looked at.
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
    )


class _Server(uvicorn.Server):
    """Drains before it ends, and follows aliases while it runs."""

    def __init__(self, config: uvicorn.Config, app: App, follower: AliasFollower | None, drain_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._follower = follower
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._following = asyncio.ensure_future(self._follower.follow()) if self._follower is not None else None
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._following is not None:
            self._following.cancel()
        await super().shutdown(sockets)

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


def _tracing() -> Callable[[App], Any]:
    try:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    except ImportError as error:
        raise MissingDependencyError(
            "opentelemetry-instrumentation-asgi is not installed: `pip install 'mlflow-trt[tracing]'`",
            packages=("opentelemetry-instrumentation-asgi",),
        ) from error
    return lambda app: OpenTelemetryMiddleware(app, excluded_urls="health,ping,metrics")
