"""Locks between processes. Each is a lock on an open file, and so goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def lock_file(path: Path, when_busy: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of `path` for the length of the block, once nobody else does; `when_busy` is called before waiting.

    Raises OSError where there is no place for the file, or what lies there is no regular file.
    """
    with open_lock_file(path) as file:
        if not try_lock(file.fileno()):
            if when_busy is not None:
                when_busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing is not enough: a process that was forked meanwhile has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def try_lock_file(path: Path) -> IO[bytes] | None:
    """The open file, which holds the lock until it is closed; None where another holds it. Raises as `lock_file`."""
    file = open_lock_file(path)
    if try_lock(file.fileno()):
        return file
    file.close()
    return None


def try_lock(handle: int) -> bool:
    """Lock an open file or folder; False where another holds its lock. Raises OSError where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock_file(path: Path) -> IO[bytes]:
    """A file to lock, made where it is missing. Whatever else lies there stays as it is.

    Raises OSError for a symbolic link, which is not followed, and for anything but a regular file.
    """
    # O_NONBLOCK: a pipe that somebody put there would be waited for.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(None, "is no regular file", str(path))
    return os.fdopen(handle, "r+b")
