"""Temporary folders and files that vanish with their process, and that the next one removes where it was killed.

Each carries the number of its process in its name and is locked by it. Whoever makes another one beside it removes
those whose lock is free and whose process is gone: a lock also tells of processes in other containers, the number of
those on file systems without locks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow_trt.core.file_lock import try_lock

PREFIX = "mlflow-trt-"
_MARK = r"(\d+)-\w{6,32}"


@contextmanager
def scratch_folder(parent: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """A folder for the length of the block, in the system's folder for temporary ones or in `parent`."""
    parent = parent or Path(tempfile.gettempdir())
    remove_abandoned(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-", dir=parent) as name, held(Path(name)):
        yield Path(name)


def scratch_name(name: str) -> str:
    """A name for what is going to be renamed to `name`, to be made beside it: see `remove_abandoned`."""
    return f".{name}.{os.getpid()}-{uuid.uuid4().hex}"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Lock a scratch folder or file for the length of the block."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # some file systems have no locks
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            try_lock(handle)
        yield


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what killed processes of this user left: everything whose name is the prefix and the mark of a process.

    What cannot be looked at, or not be removed, stays.
    """
    pattern = re.compile(re.escape(prefix) + _MARK)
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match is not None and not _is_running(int(match[1])):
                _remove_if_free(Path(entry.path))


def _remove_if_free(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.fstat(handle).st_uid != os.geteuid() or not try_lock(handle):
                return
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(handle)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        return True
    return True
