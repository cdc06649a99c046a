"""Threads that a session starts for itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from mlflow_trt.core.forking import finalize
from mlflow_trt.core.log import get_logger
from mlflow_trt.errors import SessionClosedError

_log = get_logger(__name__)


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


class Threads:
    """Do what nobody waits for, a few tasks at a time; started when first needed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._refuses = False

    def check_open(self) -> None:
        """Raises SessionClosedError after `refuse`."""
        if self._refuses:
            raise SessionClosedError

    def do(self, task: Callable[[], None]) -> None:
        """In the caller's thread where the system has none to give. Raises SessionClosedError after `refuse`."""
        with self._lock:
            self.check_open()
            if len(self._threads) < self._most:
                self._start_another()
            if self._threads:
                self._tasks.put(task)
                return
        _do(task)

    def refuse(self) -> None:
        """Take no more tasks."""
        with self._lock:
            self._refuses = True

    def close(self) -> None:
        """Take no more tasks, and wait for the end of those there are, unless one of them calls this."""
        self.refuse()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _start_another(self) -> None:
        thread = start_thread("run", _work, self._tasks)
        if thread is None:
            return
        if not self._threads:
            finalize(self, _end, self._tasks, self._most)
        self._threads.append(thread)


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        _do(task)
        del task  # or what it refers to would stay until the next one


def _do(task: Callable[[], None]) -> None:
    try:
        task()
    except Exception:  # noqa: BLE001  # who calls this goes on with the next task
        _log.exception("A task of the session's own threads failed")


def _end(tasks: queue.SimpleQueue[Callable[[], None] | None], threads: int) -> None:
    for _ in range(threads):
        tasks.put(None)
