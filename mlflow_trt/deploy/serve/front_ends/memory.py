"""Memory that a front end and the server both map: bodies in one part of it, answers in the other."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import mmap
import os

REQUEST_BYTES = 128 << 20
"""For bodies that the server has not read yet; where there is no room, they go over the socket."""
ANSWER_BYTES = 64 << 20
"""For answers that the front end has not read yet, likewise."""
SMALL = 1 << 14
"""Bytes that cost less over the socket."""
_PAGE = 4096


def create_memory() -> int:
    """The file descriptor of new memory, whose size nobody can change."""
    descriptor = os.memfd_create("mlflow-trt-front-end", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, REQUEST_BYTES + ANSWER_BYTES)
    with contextlib.suppress(OSError):  # a kernel that does not seal
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def map_memory(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, REQUEST_BYTES + ANSWER_BYTES)


class Blocks:
    """Places in a part of the memory, given out by the one process that writes there; the lowest that is free."""

    def __init__(self, start: int, size: int) -> None:
        self._free = [(start, start + size)]  # in order, and never two that touch
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """Where so many bytes have room, on a page of their own; None where they have none."""
        size = -(-max(size, 1) // _PAGE) * _PAGE
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                self._taken[start] = start + size
                return start
        return None

    def give_back(self, start: int) -> None:
        end = self._taken.pop(start)
        index = bisect.bisect(self._free, (start, end))
        first = last = index
        if index and self._free[index - 1][1] == start:
            first, start = index - 1, self._free[index - 1][0]
        if index < len(self._free) and self._free[index][0] == end:
            last, end = index + 1, self._free[index][1]
        self._free[first:last] = [(start, end)]
