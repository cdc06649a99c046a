"""What lies in the cache, and how it is kept from growing without end: what was not used for longest goes first.

Locks and marks of self-tests take no room to speak of. Marks are removed with everything else, locks never: a process
may hold one.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from mlflow_trt.core.log import get_logger
from mlflow_trt.core.scratch import scratch_folder

SIZE_VARIABLE = "MLFLOW_TRT_CACHE_SIZE"
"""The environment variable with the most that engines and kernels may take, such as 20G; 0 for no limit."""

DEFAULT_BYTES = 20 * 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_KEY = re.compile(r"[0-9a-f]{64}")
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Something that is kept: an engine with its record, or compiled kernels. `used` is when it was last read."""

    kind: str
    key: str
    path: Path
    size: int
    used: datetime

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "key": self.key,
            "path": str(self.path),
            "size": self.size,
            "used": self.used.isoformat(timespec="seconds"),
        }


def parse_size(text: str) -> int:
    """Bytes, from a number with K, M, G or T behind it, or none. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; write it like 20G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def limit() -> int | None:
    """The most that engines and kernels may take, in bytes; None without a limit."""
    configured = os.environ.get(SIZE_VARIABLE)
    try:
        size = DEFAULT_BYTES if configured is None else parse_size(configured)
    except ValueError as error:
        _log.warning("%s: %s; the cache keeps to %d GiB", SIZE_VARIABLE, error, DEFAULT_BYTES >> 30)
        size = DEFAULT_BYTES
    return size or None


def list_entries(root: Path) -> list[CacheEntry]:
    """What is kept in the cache at `root`, which was used last first. What cannot be looked at is left out."""
    entries = [*_entries(root / "engines", "engine"), *_entries(root / "kernels", "kernels")]
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def mark_used(path: Path) -> None:
    """Remember that something was read just now."""
    with contextlib.suppress(OSError):
        os.utime(path, follow_symlinks=False)


def remove_beyond(root: Path, size: int | None, *, spared: Sequence[str] = ()) -> list[CacheEntry]:
    """Remove what was not used for longest until the rest takes no more than `size`; None removes nothing.

    Entries whose key is in `spared` stay. Returns what was removed.
    """
    removed = []
    entries = list_entries(root)
    total = sum(entry.size for entry in entries)
    for entry in reversed(entries):
        if size is None or total <= size:
            break
        if entry.key not in spared and remove_entry(entry):
            removed.append(entry)
            total -= entry.size
    return removed


def remove_unused_since(root: Path, seconds: float) -> list[CacheEntry]:
    """Remove what was not used for so long; returns it."""
    before = time.time() - seconds
    return [entry for entry in list_entries(root) if entry.used.timestamp() < before and remove_entry(entry)]


def forget_self_tests(root: Path) -> int:
    """Remove the marks of self-tests that passed, so that engines are tested again; returns how many there were."""
    count = 0
    for path in _children(root / "self_tests"):
        with contextlib.suppress(OSError):
            path.unlink()
            count += 1
    return count


def remove_entry(entry: CacheEntry) -> bool:
    """Remove an entry as a whole: whoever looks for it finds all of it or nothing. Whether it is gone."""
    try:
        if entry.path.is_dir() and not entry.path.is_symlink():
            with scratch_folder(entry.path.parent, ".partial-") as aside:
                entry.path.rename(aside / "removed")
        else:
            entry.path.unlink()
    except OSError as error:
        _log.warning("%s cannot be removed: %s", entry.path, error.strerror)
        return False
    return True


def _entries(folder: Path, kind: str) -> Iterator[CacheEntry]:
    for path in _children(folder):
        with contextlib.suppress(OSError):
            files = [path, *(path.iterdir() if path.is_dir() else ())]
            found = [file.lstat() for file in files]
            size = sum(one.st_size for one in found if stat.S_ISREG(one.st_mode))
            used = datetime.fromtimestamp(max(one.st_mtime for one in found), timezone.utc)
            yield CacheEntry(kind=kind, key=path.name, path=path, size=size, used=used)


def _children(folder: Path) -> Iterable[Path]:
    """What has a key for its name: neither links, nor what is being written."""
    try:
        return [path for path in folder.iterdir() if _KEY.fullmatch(path.name) and not path.is_symlink()]
    except OSError:
        return []
