"""Files that others may be reading."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, Any

from mlflow_trt.core.scratch import held, remove_abandoned, scratch_name


def write_whole(path: Path, content: Any) -> None:
    """Write aside, then replace: whoever reads the path sees the old file or the whole new one.

    `content` is bytes, or memory that the buffer protocol shows, as TensorRT's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, f".{path.name}.")
    partial = path.with_name(scratch_name(path.name))
    try:
        with partial.open("xb") as file, held(partial):
            file.write(memoryview(content))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
