"""The access log: a line of JSON for each request."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import TextIO

from mlflow_trt.core.log import get_logger
from mlflow_trt.deploy.serve import json_text
from mlflow_trt.deploy.serve.http import Exchange

_log = get_logger(__name__)


class AccessLog:
    """Writes lines that say who asked for what, and what came of it; no data and no keys."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, exchange: Exchange, began: float, cause: str) -> None:
        """One line. `cause` is why it failed."""
        scope = exchange.scope
        client = scope.get("client")
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": exchange.status,
            "milliseconds": round((time.monotonic() - began) * 1e3, 3),
            "received": exchange.received,
            "sent": exchange.sent,
        }
        if cause:
            line["cause"] = cause
        for header, name in ((b"x-request-id", "request"), (b"traceparent", "trace")):
            if header in exchange.headers:
                line[name] = exchange.headers[header].decode(errors="replace")[:200]
        try:
            self._stream.write(json_text.write(line).decode() + "\n")
            self._stream.flush()
        except OSError as error:  # the disk is full, or who read it is gone: requests are answered all the same
            if not self._is_lost:
                _log.warning("The access log cannot be written, and goes on when it can be: %s", error)
            self._is_lost = True
        else:
            self._is_lost = False
