"""Threads that a session starts for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable


class _OwnThread(threading.Thread):
    pass


def start_thread(name: str, work: Callable[..., object], *arguments: object) -> threading.Thread | None:
    """None where the system has no thread to give, which passes."""
    # As a daemon: the interpreter would wait for it before it closes the session that ends it.
    thread = _OwnThread(target=work, args=arguments, name=f"mlflow-trt-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def is_own_thread() -> bool:
    """Whether one of them runs this."""
    return isinstance(threading.current_thread(), _OwnThread)
