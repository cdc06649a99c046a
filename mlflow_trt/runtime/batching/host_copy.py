"""Copies between arrays in host memory by several threads: one thread is far slower than the bus to the GPU."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import numpy as np

from mlflow_trt.core.arrays import Array
from mlflow_trt.runtime import native
from mlflow_trt.runtime.native import address

if TYPE_CHECKING:
    from mlflow_trt import _native

THREADS = min(8, os.cpu_count() or 1)
LEAST_BYTES = 1 << 20
"""What is worth a thread's while: waking one takes about as long as copying a few hundred kilobytes."""

HELD_BYTES = 8 << 20
"""Up to which the small rows of several callers are copied by one thread that keeps the interpreter lock."""

STEPS = 16
"""In which the extension tells of the rows that have arrived; each costs an upload of its own, some microseconds."""

Copy = tuple[Array, Array]
"""Where from and where to; a source of one row fills every row of its target."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def copy_rows(parts: Iterable[tuple[Array, int, int]], target: Array) -> Iterator[int]:
    """Fill the rows of `target` from parts: arrays, and the rows that each goes to, from and to, without gaps.

    A part of a single row fills all of its rows. Yields how many rows have arrived, all of them when it ends.
    """
    parts = list(parts)
    if target.nbytes > HELD_BYTES or any(source.nbytes > LEAST_BYTES for source, _, _ in parts):
        if native.extension is not None and all(_is_alike(source, target) for source, _, _ in parts):
            yield from _copy_rows_natively(native.extension.Copying, parts, target)
        else:
            yield from _by_threads(_share_out_copies(parts, target))
        return
    for source, start, stop in parts:
        if len(source) == stop - start:
            _copy_held(source, target[start:stop])
        else:
            target[start:stop] = source
    yield len(target)


def copies(sources: Sequence[Array]) -> list[Array]:
    """New arrays with the contents of these, which are contiguous; large ones are copied by several threads.

    The system hands out new memory page by page, at the first touch, which takes longer than the copy itself.
    """
    targets = [np.empty(source.shape, source.dtype) for source in sources]
    pairs = list(zip(sources, targets, strict=True))
    if sum(source.nbytes for source in sources) <= LEAST_BYTES:
        for source, target in pairs:
            _copy_held(source, target)
    elif native.extension is not None:
        _copy_natively(native.extension.Copying, pairs)
    else:
        _copy_in_blocks(pairs)
    return targets


def _copy_held(source: Array, target: Array) -> None:
    """Copy into an array of the same shape and dtype, both contiguous, without letting go of the interpreter lock.

    numpy lets go of it, and among many threads it takes longer to get it back than to copy a megabyte.
    """
    if source.nbytes:
        _memory(target)[:] = _memory(source)


def _copy_natively(copying: Callable[[list[int]], _native.Copying], pairs: Iterable[Copy]) -> None:
    numbers: list[int] = []
    for source, target in pairs:
        numbers += (address(target), address(source), source.nbytes)
    with closing(copying(numbers)) as job:
        job.advance(sum(numbers[2::3]))


def _copy_in_blocks(pairs: Iterable[Copy]) -> None:
    flat = [(_flat(source), _flat(target)) for source, target in pairs]
    blocks = [
        (source[start : start + LEAST_BYTES], target[start : start + LEAST_BYTES])
        for source, target in flat
        for start in range(0, len(source), LEAST_BYTES)
    ]
    for _ in _by_threads((0, blocks[thread::THREADS]) for thread in range(min(THREADS, len(blocks)))):
        pass


def _copy_rows_natively(
    copying: Callable[[list[int]], _native.Copying], parts: list[tuple[Array, int, int]], target: Array
) -> Iterator[int]:
    row_bytes, first = target.nbytes // len(target), address(target)
    numbers: list[int] = []
    filled = []
    for source, start, stop in parts:
        if len(source) == stop - start:
            numbers += (first + start * row_bytes, address(source), source.nbytes)
        else:  # with one row, which is padding: less than the rest
            target[start:stop] = source
            filled.append((start, stop))
    step = math.ceil(max(LEAST_BYTES, target.nbytes / STEPS) / max(1, row_bytes))
    with closing(copying(numbers)) as job:
        for end in (*range(step, len(target), step), len(target)):
            job.advance((end - sum(max(0, min(end, stop) - start) for start, stop in filled)) * row_bytes)
            yield end


def _is_alike(source: Array, target: Array) -> bool:
    """Whether rows of one may be copied to the other byte by byte."""
    return source.shape[1:] == target.shape[1:] and source.dtype == target.dtype and source.flags.c_contiguous


def _by_threads(groups: Iterable[tuple[int, list[Copy]]]) -> Iterator[int]:
    """Make each group of copies in a thread, the first in the caller's; yields the number of each that is done."""
    (first, own), *others = groups
    # Our own futures: one that is cancelled is not begun any more, though the pool has its job.
    running: list[tuple[int, list[Copy], Future[None]]] = [(number, group, Future()) for number, group in others]
    try:
        with suppress(RuntimeError):  # the system has no thread to give
            for _, group, job in running:
                _threads().submit(_work_on, job, group)
        _copy(own)  # the caller takes its share: it would only wait
        yield first
        for number, group, job in running:
            if job.cancel():  # nobody has begun
                _copy(group)
            else:
                job.result()
            yield number
    finally:
        # Whoever stops listening gets back memory that nobody reads or writes any more.
        for _, _, job in running:
            if not job.cancel():
                job.exception()


def _share_out_copies(parts: Iterable[tuple[Array, int, int]], target: Array) -> Iterator[tuple[int, list[Copy]]]:
    """Copies of about equal size, one group for each thread, and the row at which each group ends."""
    row_bytes = max(1, target.nbytes // max(1, len(target)))
    share = max(1, round(max(LEAST_BYTES, target.nbytes / THREADS) / row_bytes))
    group: list[Copy] = []
    room, end = share, 0
    for source, start, stop in parts:
        end = start
        while end < stop:
            count = min(stop - end, room)
            block = source if len(source) == 1 else source[end - start : end - start + count]
            group.append((block, target[end : end + count]))
            end, room = end + count, room - count
            if room == 0:
                yield end, group
                group, room = [], share
    if group or end == 0:
        yield end, group


def _work_on(job: Future[None], group: list[Copy]) -> None:
    """Make these copies, unless whoever waits for the job has cancelled it."""
    if not job.set_running_or_notify_cancel():
        return
    try:
        _copy(group)
    except BaseException as error:  # noqa: BLE001  # raised again by `result`
        job.set_exception(error)
    else:
        job.set_result(None)


def _copy(group: list[Copy]) -> None:
    for source, target in group:
        np.copyto(target, source)


def _threads() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603  # one for the process, made when first needed
    with _lock:
        if _pool is None:
            # More than one copy takes: there may be several GPUs, and a copy for each at the same time.
            _pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1), thread_name_prefix="mlflow-trt-copy")
        return _pool


def _flat(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def _memory(array: Array) -> memoryview:
    # As bytes: memoryviews of equal dtypes may be in different formats, and those of others in none, such as bfloat16.
    view: memoryview = _flat(array).data
    return view


def _forget_threads() -> None:
    global _pool, _lock  # a forked process has neither the threads nor whoever held the lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)
