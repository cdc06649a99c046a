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
from collections.abc import Callable, Hashable, Sequence
from typing import Generic

from mlflow_trt.inputs import Feeds
from mlflow_trt.runtime.batching import Outputs, Sizes, check_rows
from mlflow_trt.runtime.copying import copies, copy_small
from mlflow_trt.runtime.slots import AnySlot, Slots, Tray

MOST_TRAYS = 4
"""Two that run and two that are filled, for shapes that differ."""

CHEAP_BYTES = 4 << 20


class Kind:
    """What is the same for all requests of some shapes, so that it is found out only once.

    Attributes:
        profile, sizes: they run on this profile, in one of its sizes.
        row: the dtypes and shapes of a row, which tell what trays are good for them.
        cheap_rows: how many rows cost so little memory that every tray has them.
    """

    __slots__ = ("cheap_rows", "profile", "row", "sizes")

    def __init__(self, feeds: Feeds, batched: Sequence[str], profile: int, sizes: Sizes) -> None:
        arrays = [feeds[name] for name in batched]
        row_bytes = sum(math.prod(array.shape[1:]) * array.itemsize for array in arrays)
        self.profile = profile
        self.sizes = sizes
        self.row: Hashable = tuple([(array.dtype, array.shape[1:]) for array in arrays])
        self.cheap_rows = sizes.largest if sizes.largest * row_bytes <= CHEAP_BYTES else 1


class Request:
    """One caller's batch. Requests with the same `key` may run together; their kinds have one profile and row."""

    __slots__ = ("feeds", "key", "kind", "outputs", "rows", "start", "wake")

    def __init__(self, feeds: Feeds, rows: int, kind: Kind, key: Hashable) -> None:
        self.feeds = feeds
        self.rows = rows
        self.kind = kind
        self.key = key
        self.start = 0
        self.outputs: Outputs | None = None
        # Held until the outputs are there: a bare lock costs a tenth of an Event, and this is the hot path.
        self.wake = threading.Lock()
        self.wake.acquire()


class _Batch:
    """Requests that run together, and the memory that their rows are copied to. All methods want the lock."""

    __slots__ = ("_changed", "_lock", "capacity", "copying", "is_shut", "requests", "rows", "tray")

    def __init__(self, tray: Tray, largest: int, lock: threading.Lock) -> None:
        self.tray = tray
        self.is_shut = False
        self.capacity = min(tray.rows, largest)
        self.rows = 0
        self.requests: list[Request] = []
        self.copying = 0
        self._lock = lock
        self._changed: threading.Condition | None = None  # most leaders wait for nobody

    def has_room(self, rows: int) -> bool:
        return self.rows + rows <= self.capacity

    def seat(self, request: Request) -> None:
        request.start = self.rows
        self.rows += request.rows
        self.requests.append(request)
        self.copying += 1

    def wait(self, seconds: float | None = None) -> None:
        """For a change. Only the leader waits: waking up threads that have nothing to do is what costs most here."""
        if self._changed is None:
            self._changed = threading.Condition(self._lock)
        self._changed.wait(seconds)

    def tell(self) -> None:
        """The leader, if it waits, that something changed."""
        if self._changed is not None:
            self._changed.notify()


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
        self._trays = _Trays(make_tray, batched)
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
        return self._run_alone(request) if request.outputs is None else request.outputs

    def kind(self, feeds: Feeds, profile: int, sizes: Sizes) -> Kind:
        """That of requests with such feeds."""
        return Kind(feeds, self._batched, profile, sizes)

    def prepare(self, feeds: Feeds, kind: Kind, count: int) -> None:
        """Make memory for so many of the largest batches with rows like those of `feeds`."""
        for tray in [self._trays.take(feeds, kind, kind.sizes.largest) for _ in range(count)]:
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
                    batch.tell()
                return batch
            was_full = batch is not None
        tray = self._trays.take(request.feeds, request.kind, request.rows, was_full=was_full)
        batch = _Batch(tray, request.kind.sizes.largest, self._lock)
        with self._lock:
            self._seat(request, batch)
            # Who comes from now on joins this one. One that is full, or was opened in the same moment, runs as it is.
            self._open[request.key] = batch
        return batch

    def _seat(self, request: Request, batch: _Batch) -> None:
        self._callers += 1
        batch.seat(request)

    def _copy(self, request: Request, batch: _Batch) -> None:
        try:
            start, stop = request.start, request.start + request.rows
            for name in self._batched:
                copy_small(request.feeds[name], batch.tray.arrays[name][start:stop])
        finally:
            with self._lock:
                batch.copying -= 1
                if batch.is_shut and not batch.copying:
                    batch.tell()

    def _run_batch(self, first: Request, batch: _Batch) -> None:
        slot = self._slots.acquire()
        try:
            self._close_batch(batch)
            size = first.kind.sizes.hold(batch.rows)
            try:
                slot.launch_tray(batch.tray, batch.rows, size, first.feeds, first.kind.profile)
                launched = self._launched = time.monotonic()
                outputs = slot.finish()
                # The shortest of late: what goes beyond it was spent waiting for the interpreter lock.
                self._seconds = min(1.2 * self._seconds, time.monotonic() - launched)
                check_rows(outputs, size)
                _hand_out(outputs, batch.requests)
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
            if self._is_expecting(batch):
                now = time.monotonic()
                half_done = self._launched + self._seconds / 2 if self._running else 0.0
                until = min(now + self._max_delay, max(half_done, now + self._seconds / 4))
                while self._is_expecting(batch) and (left := until - time.monotonic()) > 0:
                    batch.wait(left)
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
            batch.wait()

    def _dissolve(self, batch: _Batch) -> None:
        """Let everybody go, whether there are outputs or not."""
        with self._lock:
            self._shut(batch)
            self._callers -= len(batch.requests)
        self._trays.put_back(batch.tray)
        for request in batch.requests[1:]:
            request.wake.release()


def _hand_out(outputs: Outputs, requests: Sequence[Request]) -> None:
    """Give every request a copy of its rows."""
    parts = [output[one.start : one.start + one.rows] for one in requests for output in outputs.values()]
    copied = iter(copies(parts))
    for request in requests:
        request.outputs = {name: next(copied) for name in outputs}


class _Trays:
    """Trays that wait for their next batch. They hold the largest size where that is cheap; else they grow with the
    number of callers, since a lone one needs a single row.
    """

    def __init__(self, make: Callable[[Feeds, int], Tray], batched: Sequence[str]) -> None:
        self._make = make
        self._batched = batched
        self._lock = threading.Lock()
        self._kept: list[Tray] = []
        self._wanted: dict[Hashable, int] = {}
        self._closed = False

    def take(self, feeds: Feeds, kind: Kind, rows: int, *, was_full: bool = False) -> Tray:
        """Memory for `rows` like those of `feeds`; for more where it was cheap, needed before, or the last was full."""
        key, sizes = kind.row, kind.sizes
        with self._lock:
            wanted = max(self._wanted.get(key, kind.cheap_rows), sizes.hold(rows))
            if was_full:
                wanted = min(2 * wanted, sizes.largest)
            if len(self._wanted) > MOST_TRAYS:
                self._wanted.clear()
            self._wanted[key] = wanted
            for tray in reversed(self._kept):
                if tray.key == key and tray.rows >= wanted:
                    self._kept.remove(tray)
                    return tray
        tray = self._make({name: feeds[name] for name in self._batched}, wanted)
        tray.key = key
        return tray

    def put_back(self, tray: Tray) -> None:
        with self._lock:
            excess: Tray | None = tray
            if not self._closed:
                self._kept.append(tray)
                excess = self._kept.pop(0) if len(self._kept) > MOST_TRAYS else None
        if excess is not None:
            excess.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, []
        for tray in kept:
            tray.close()
