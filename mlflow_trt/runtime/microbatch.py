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

from mlflow_trt.inputs import Feeds
from mlflow_trt.runtime.batching import Outputs, Sizes, check_rows
from mlflow_trt.runtime.copying import copy_small
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
    """Requests that run together, and the memory that their rows are copied to.

    `changed` is for its leader alone: waking up threads that have nothing to do is what costs most here.
    """

    def __init__(self, tray: Tray, largest: int, lock: threading.Lock) -> None:
        self.tray = tray
        self.changed = threading.Condition(lock)
        self.is_shut = False
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
        self._open: dict[Hashable, _Batch] = {}
        self._callers = 0  # in here
        self._usual_callers = 0.0  # of late
        self._running = 0  # of their requests
        self._launched = 0.0
        self._seconds = math.inf  # that a run takes; not known yet

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

    def prepare(self, feeds: Feeds, sizes: Sizes, count: int) -> None:
        """Make memory for so many of the largest batches with rows like those of `feeds`."""
        batched = {name: feeds[name] for name in self._batched}
        for tray in [self._trays.take(batched, sizes, rows=sizes.largest) for _ in range(count)]:
            self._trays.put_back(tray)

    def close(self) -> None:
        """Free the memory of batches, none of which is running any more."""
        self._trays.close()

    def _take_seats(self, request: Request) -> _Batch:
        with self._lock:
            batch = self._open.get(request.key)
            if batch is not None and batch.has_room(request.rows):
                self._seat(request, batch)
                if not self._is_expecting(batch):
                    batch.changed.notify()
                return batch
            was_full = batch is not None
        batched = {name: request.feeds[name] for name in self._batched}
        tray = self._trays.take(batched, request.sizes, rows=request.rows, was_full=was_full)
        with self._lock:
            batch = _Batch(tray, request.sizes.largest, self._lock)
            self._seat(request, batch)
            # Who comes from now on joins this one. One that is full, or was opened in the same moment, runs as it is.
            self._open[request.key] = batch
        return batch

    def _seat(self, request: Request, batch: _Batch) -> None:
        self._callers += 1
        batch.seat(request)

    def _copy(self, request: Request, batch: _Batch) -> None:
        try:
            for name in self._batched:
                target = batch.tray.arrays[name][request.start : request.start + request.rows]
                copy_small(request.feeds[name], target)
        finally:
            with self._lock:
                batch.copying -= 1
                if batch.is_shut and not batch.copying:
                    batch.changed.notify()

    def _run_batch(self, first: Request, batch: _Batch) -> None:
        slot = self._slots.acquire()
        try:
            self._close_batch(batch)
            size = first.sizes.hold(batch.rows)
            try:
                slot.launch_tray(batch.tray, batch.rows, size, first.feeds, first.profile)
                launched = self._launched = time.monotonic()
                outputs = slot.finish()
                # The shortest of late: what goes beyond it was spent waiting for the interpreter lock.
                self._seconds = min(1.2 * self._seconds, time.monotonic() - launched)
                check_rows(outputs, size)
                batch.outputs = {name: output[: batch.rows].copy() for name, output in outputs.items()}
            except BaseException:
                slot.abandon()
                raise
            finally:
                with self._lock:
                    self._running -= len(batch.requests)
            self._ran(size)
        finally:
            self._slots.release(slot)

    def _close_batch(self, batch: _Batch) -> None:
        """Wait for as many as usually come, but no longer than is worth it.

        That is until the batch before this one is half done, when it is time to send this one off for the GPU to find
        it ready; or, for who comes later than that, a quarter of a run.
        """
        with self._lock:
            self._usual_callers = max(self._callers, 0.8 * self._usual_callers)
            now = time.monotonic()
            half_done = self._launched + self._seconds / 2 if self._running else 0.0
            until = min(now + self._max_delay, max(half_done, now + self._seconds / 4))
            while self._is_expecting(batch) and (left := until - time.monotonic()) > 0:
                batch.changed.wait(left)
            self._shut(batch)
            self._running += len(batch.requests)

    def _is_expecting(self, batch: _Batch) -> bool:
        return batch.has_room(1) and len(batch.requests) < self._usual_callers - self._running

    def _shut(self, batch: _Batch) -> None:
        """Let no more requests in, and wait until those that are in have copied their rows."""
        key = batch.requests[0].key
        if self._open.get(key) is batch:
            del self._open[key]
        batch.is_shut = True
        while batch.copying:
            batch.changed.wait()

    def _dissolve(self, batch: _Batch) -> None:
        """Let everybody go, whether there are outputs or not."""
        with self._lock:
            self._shut(batch)
            self._callers -= len(batch.requests)
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

    def take(self, feeds: Feeds, sizes: Sizes, *, rows: int, was_full: bool = False) -> Tray:
        """Memory for `rows` like those of `feeds`; for more where it was cheap, needed before, or the last was full."""
        key = tuple((array.dtype, array.shape[1:]) for array in feeds.values())
        row_bytes = sum(array[:1].nbytes for array in feeds.values())
        cheap = sizes.largest if sizes.largest * row_bytes <= CHEAP_BYTES else 1
        with self._lock:
            wanted = max(self._wanted.get(key, cheap), sizes.hold(rows))
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
