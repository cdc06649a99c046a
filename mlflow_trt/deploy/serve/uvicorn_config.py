"""How uvicorn serves, here and in front ends."""

from __future__ import annotations

import ssl as ssl_module
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import uvicorn

from mlflow_trt.deploy.serve.connection import Connection

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_KEEP_ALIVE = 75
_PIECE = 1 << 18


def uvicorn_config(app: Application, seconds: float, ssl: Mapping[str, str | None]) -> uvicorn.Config:
    """Args:
    app: what answers.
    seconds: for a request, also when the server ends.
    ssl: uvicorn's `ssl_keyfile`, `ssl_certfile`, `ssl_keyfile_password` and `ssl_ca_certs`; empty for HTTP.
    """
    return uvicorn.Config(
        in_pieces(app),
        loop="uvloop",
        http=partial(Connection, head_seconds=seconds),  # type: ignore[arg-type]  # as good as a class of its own
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


def in_pieces(app: Application) -> Application:
    """Let large answers go in pieces, each when the client has taken most of those before it.

    To uvicorn an answer is sent when it has all of it. Then it closes the connection when that was idle for long, and
    over TLS what the client has not taken half a minute later is lost.
    """

    async def send_in_pieces(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_pieces(message: Message) -> None:
            body = message.get("body", b"")
            if len(body) > _PIECE:
                left = memoryview(body)
                while len(left) > _PIECE:
                    await send({"type": "http.response.body", "body": left[:_PIECE], "more_body": True})
                    left = left[_PIECE:]
                message = {**message, "body": left}
            await send(message)

        await app(scope, receive, send_pieces)

    return send_in_pieces
