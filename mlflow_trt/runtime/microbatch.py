"""The micro-batcher: requests that several callers send at the same time run together.

There is no thread of its own. A caller takes seats in the batch that is being filled and copies its rows there, at the
same time as others do. Who came first leads: it waits for a slot, closes the batch and runs it; then every caller takes
its rows. Meanwhile the next batch is filled. A caller that is alone waits for nobody.

Python's interpreter lock decides how fast this is, so whoever leads does as few things as possible that let go of it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic

import numpy as np

from mlflow_trt.inputs import Feeds
from mlflow_trt.runtime.batching import Outputs, Sizes, check_rows
from mlflow_trt.runtime.slots import AnySlot, Slots, Tray

MOST_TRAYS = 4
"""Two that run and two that are filled, for shapes that differ."""

CHEAP_BYTES = 4 << 20


class Request:
    """One caller's batch. Requests with the same `key` may run together; `sizes` are those of `profile`."""

    __slots__ = ("feeds", "key", "profile", "rows", "sizes", "start", "wake")

    def __init__(self, feeds: Feeds, rows: int, *, profile: int, sizes: Sizes, key: Hashable) -> None:
        self.feeds = feeds
        self.rows = rows
        self.profile = profile
        self.sizes = sizes
        self.key = key
        self.start = 0
        # Held until the outputs are there: a bare lock costs a tenth of an Event, and this is the hot path.
        self.wake = threading.Lock()
        self.wake.acquire()


class _Batch:
    """Requests that run together, and the memory that their rows are copied to."""

    def __init__(self, tray: Tray, largest: int) -> None:
        self.tray = tray
        self.capacity = min(tray.rows, largest)
        self.rows = 0
        self.requests: list[Request] = []
        self.copying = 0
        self.outputs: Outputs | None = None

    def has_room(self, rows: int) -> bool:
        return self.rows + rows <= self.capacity

    def seat(self, request: Request) -> None:
        request.start = self.rows
        self.rows += request.rows
        self.requests.append(request)
        self.copying += 1


class MicroBatcher(Generic[AnySlot]):
    """Runs requests in the slots of a session.

    Args:
        slots: where batches run.
        make_tray: makes memory for so many rows of these inputs.
        batched: the inputs that have rows; of the others all requests of one key have the same.
        run_alone: runs one request by itself: what happens to each of a batch that failed, so that every caller gets
            its own result or its own error.
        ran: told the size of each batch.
        max_delay: seconds for which a batch stays open at most while another one runs.
    """

    def __init__(
        self,
        slots: Slots[AnySlot],
        make_tray: Callable[[Feeds, int], Tray],
        batched: tuple[str, ...],
        run_alone: Callable[[Request], Outputs],
        ran: Callable[[int], None],
        max_delay: float,
    ) -> None:
        self._slots = slots
        self._trays = _Trays(make_tray)
        self._batched = batched
        self._run_alone = run_alone
        self._ran = ran
        self._max_delay = max_delay
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._open: dict[Hashable, _Batch] = {}
        self._running = 0
        self._last_seconds = math.inf  # not known yet

    def run(self, request: Request) -> Outputs:
        """The outputs for the request's rows. Raises what running it alone raises."""
        batch = self._take_seats(request)
        leads = batch.requests[0] is request
        try:
            self._copy(request, batch)
            if leads:
                self._run_batch(request, batch)
        except Exception:
            if not leads or len(batch.requests) == 1:
                raise
        finally:
            if leads:
                self._dissolve(batch)
        if not leads:
            request.wake.acquire()
        if batch.outputs is None:
            return self._run_alone(request)
        if len(batch.requests) == 1:
            return batch.outputs
        stop = request.start + request.rows
        return {name: output[request.start : stop].copy() for name, output in batch.outputs.items()}

    def close(self) -> None:
        """Free the memory of batches, none of which is running any more."""
        self._trays.close()

    def _take_seats(self, request: Request) -> _Batch:
        with self._lock:
            batch = self._open.get(request.key)
            if batch is not None and batch.has_room(request.rows):
                batch.seat(request)
                return batch
            was_full = batch is not None
        tray = self._trays.take({name: request.feeds[name] for name in self._batched}, request.sizes, was_full=was_full)
        with self._lock:
            batch = _Batch(tray, request.sizes.largest)
            batch.seat(request)
            # Who comes from now on joins this one. One that is full, or was opened in the same moment, runs as it is.
            self._open[request.key] = batch
        return batch

    def _copy(self, request: Request, batch: _Batch) -> None:
        try:
            for name in self._batched:
                np.copyto(batch.tray.arrays[name][request.start : request.start + request.rows], request.feeds[name])
        finally:
            with self._lock:
                batch.copying -= 1
                if not batch.copying:
                    self._changed.notify_all()

    def _run_batch(self, first: Request, batch: _Batch) -> None:
        slot = self._slots.acquire()
        try:
            self._close_batch(batch)
            size = first.sizes.hold(batch.rows)
            started = time.monotonic()
            try:
                slot.load_tray(batch.tray, batch.rows, size, first.feeds, first.profile)
                slot.launch()
                outputs = slot.finish()
                check_rows(outputs, size)
                batch.outputs = {name: output[: batch.rows].copy() for name, output in outputs.items()}
            except BaseException:
                slot.abandon()
                raise
            finally:
                with self._lock:
                    self._running -= 1
                    self._last_seconds = time.monotonic() - started
                    self._changed.notify_all()
            self._ran(size)
        finally:
            self._slots.release(slot)

    def _close_batch(self, batch: _Batch) -> None:
        """Let others in while the batch before this one runs, for half of its time: the rest goes to copying."""
        with self._lock:
            until = time.monotonic() + min(self._max_delay, self._last_seconds / 2)
            while self._running and batch.has_room(1) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._shut(batch)
            self._running += 1

    def _shut(self, batch: _Batch) -> None:
        """Let no more requests in, and wait until those that are in have copied their rows."""
        key = batch.requests[0].key
        if self._open.get(key) is batch:
            del self._open[key]
        while batch.copying:
            self._changed.wait()

    def _dissolve(self, batch: _Batch) -> None:
        """Let everybody go, whether there are outputs or not."""
        with self._lock:
            self._shut(batch)
        self._trays.put_back(batch.tray)
        for request in batch.requests[1:]:
            request.wake.release()


class _Trays:
    """Trays that wait for their next batch. They hold the largest size where that is cheap; else they grow with the
    number of callers, since a lone one needs a single row.
    """

    def __init__(self, make: Callable[[Feeds, int], Tray]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._kept: list[Tray] = []
        self._wanted: dict[Hashable, int] = {}
        self._closed = False

    def take(self, feeds: Feeds, sizes: Sizes, *, was_full: bool) -> Tray:
        """Memory for rows like those of `feeds`; for more of them where the last batch had become full."""
        key = tuple((array.dtype, array.shape[1:]) for array in feeds.values())
        first = next(iter(feeds.values()))
        row_bytes = sum(array.nbytes for array in feeds.values()) // len(first)
        cheap = sizes.largest if sizes.largest * row_bytes <= CHEAP_BYTES else 1
        with self._lock:
            wanted = max(self._wanted.get(key, cheap), sizes.hold(len(first)))
            if was_full:
                wanted = min(2 * wanted, sizes.largest)
            if len(self._wanted) > MOST_TRAYS:
                self._wanted.clear()
            self._wanted[key] = wanted
            for tray in reversed(self._kept):
                if tray.key == key and tray.rows >= wanted:
                    self._kept.remove(tray)
                    return tray
        tray = self._make(feeds, wanted)
        tray.key = key
        return tray

    def put_back(self, tray: Tray) -> None:
        with self._lock:
            self._kept.append(tray)
            excess = self._kept if self._closed else self._kept[:-MOST_TRAYS]
            self._kept = [] if self._closed else self._kept[-MOST_TRAYS:]
        for old in excess:
            old.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, []
        for tray in kept:
            tray.close()
