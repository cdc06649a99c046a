"""Other processes, as the kernel lists them: each may end while it is looked at, as may threads that started some."""

from __future__ import annotations

import contextlib
from pathlib import Path


def _read(path: Path) -> bytes:
    """Nothing of what has ended: its file is gone, or can be opened and not read any more."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return path.read_bytes()
    return b""


def is_running(pid: int) -> bool:
    """False also for a process that stays listed only until somebody asks how it ended."""
    stat = _read(Path(f"/proc/{pid}/stat"))  # `PID (NAME) STATE ...`, where a name may have anything
    return stat.rpartition(b") ")[2][:1] not in (b"", b"Z", b"X")


def children_of(pid: int, *, running: str = "") -> list[int]:
    """The processes that one has started, of its threads whichever; each thread's latest last.

    Args:
        pid: the process that started them.
        running: what their command line has to have; one that has ended has none any more.
    """
    lists = [_read(thread / "children") for thread in Path(f"/proc/{pid}/task").glob("*")]
    children = [int(child) for listed in lists for child in listed.split()]
    return [child for child in children if running.encode() in _read(Path(f"/proc/{child}/cmdline"))]
