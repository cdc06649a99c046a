"""Calls in threads that do not keep the process from ending."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def begin_call(call: Callable[[], _T], name: str) -> Future[_T]:
    """Call it in such a thread, in the context of the caller. Whoever cancels the future does not cancel the call."""
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(call))
        except BaseException as error:  # noqa: BLE001  # raised again where the result is wanted
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
