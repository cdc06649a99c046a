"""How uvicorn serves, here and in front ends."""

from __future__ import annotations

import ssl as ssl_module
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import uvicorn

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_KEEP_ALIVE = 75


def uvicorn_config(app: Application, seconds: float, ssl: Mapping[str, str | None]) -> uvicorn.Config:
    """Args:
    app: what answers.
    seconds: for a request, also when the server ends.
    ssl: uvicorn's `ssl_keyfile`, `ssl_certfile`, `ssl_keyfile_password` and `ssl_ca_certs`; empty for HTTP.
    """
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
        timeout_graceful_shutdown=int(seconds) + 1,
        # Without it, the certificates of clients would not be looked at.
        ssl_cert_reqs=ssl_module.CERT_REQUIRED if ssl.get("ssl_ca_certs") else ssl_module.CERT_NONE,
        **ssl,  # type: ignore[arg-type]  # the names say which is which
    )
