"""The micro-batcher: requests that several callers send at the same time run together.

There is no thread of its own. The caller whose request has waited longest leads: it gets a slot, collects what goes
together with its own request, runs it, and hands every caller its rows; meanwhile the next in line leads the next
batch in another slot. A caller that is alone never waits for anybody.
"""

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic

from mlflow_trt.inputs import Feeds
from mlflow_trt.runtime.batching import Outputs, Rows, Sizes, check_rows
from mlflow_trt.runtime.slots import AnySlot, Slots
from mlflow_trt.spec import BatchAxis


class Request:
    """One caller's batch. Requests with the same `key` may run together; `sizes` are those of `profile`."""

    __slots__ = ("axis", "feeds", "key", "outputs", "profile", "rows", "sizes", "wake")

    def __init__(self, feeds: Feeds, rows: int, *, axis: BatchAxis, profile: int, sizes: Sizes, key: Hashable) -> None:
        self.feeds = feeds
        self.rows = rows
        self.axis = axis
        self.profile = profile
        self.sizes = sizes
        self.key = key
        self.outputs: Outputs | None = None
        # Held until this caller has something to do: a bare lock costs a tenth of an Event, and this is the hot path.
        self.wake = threading.Lock()
        self.wake.acquire()


class MicroBatcher(Generic[AnySlot]):
    """Runs requests in the slots of a session.

    Args:
        slots: where batches run.
        run_alone: runs one request by itself: what happens to each of a batch that failed, so that every caller gets
            its own result or its own error.
        ran: told the size of each batch and the number of requests in it.
        max_delay: seconds for which a batch stays open at most while another one runs.
    """

    def __init__(
        self,
        slots: Slots[AnySlot],
        run_alone: Callable[[Request], Outputs],
        ran: Callable[[int], None],
        max_delay: float,
    ) -> None:
        self._slots = slots
        self._run_alone = run_alone
        self._ran = ran
        self._max_delay = max_delay
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: collections.deque[Request] = collections.deque()
        self._leader: Request | None = None
        self._running = 0
        self._last_seconds = math.inf  # not known yet

    def run(self, request: Request) -> Outputs:
        """The outputs for the request's rows. Raises what running it alone raises."""
        with self._lock:
            self._queue.append(request)
            leads = self._leader is None
            if leads:
                self._leader = request
        if not leads:
            request.wake.acquire()
            if request.outputs is not None:
                return request.outputs
            if self._leader is not request:
                return self._run_alone(request)
        return self._lead(request)

    def _lead(self, request: Request) -> Outputs:
        try:
            slot = self._slots.acquire()
        except BaseException:
            with self._lock:
                self._queue.remove(request)
                self._pass_on()
            raise
        batch = [request]
        try:
            with self._lock:
                try:
                    self._wait_for_others()
                finally:
                    batch, size = self._collect(request)
                    self._pass_on()
            self._run(slot, batch, size)
        except Exception:
            if len(batch) == 1:
                raise
        finally:
            self._slots.release(slot)
            for other in batch[1:]:
                other.wake.release()
        return self._run_alone(request) if request.outputs is None else request.outputs

    def _wait_for_others(self) -> None:
        """Let more requests come while the batch before this one runs: half its time, for the rest goes to copying."""
        until = time.monotonic() + min(self._max_delay, self._last_seconds / 2)
        while self._running and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)

    def _collect(self, first: Request) -> tuple[list[Request], int]:
        """Take from the queue what runs together: of one key, and as many as the best size for them holds."""
        fitting, rows = [], 0
        for request in self._queue:
            if request.key == first.key and rows + request.rows <= first.sizes.largest:
                fitting.append(request)
                rows += request.rows
        size = max(first.sizes.cut(rows)[0], first.rows)
        batch, rows = [], 0
        for request in fitting:
            if rows + request.rows <= size:
                batch.append(request)
                rows += request.rows
        taken = set(map(id, batch))
        self._queue = collections.deque(request for request in self._queue if id(request) not in taken)
        return batch, size

    def _pass_on(self) -> None:
        """Let whoever waits longest lead the next batch."""
        self._leader = self._queue[0] if self._queue else None
        if self._leader is not None:
            self._leader.wake.release()

    def _run(self, slot: AnySlot, batch: list[Request], size: int) -> None:
        first = batch[0]
        started = time.monotonic()
        with self._lock:
            self._running += 1
        try:
            slot.load(Rows([request.feeds for request in batch], first.axis, size), first.profile)
            slot.launch()
            outputs = slot.finish()
            check_rows(outputs, size)
            start = 0
            for request in batch:
                stop = start + request.rows
                request.outputs = {name: output[start:stop].copy() for name, output in outputs.items()}
                start = stop
        except BaseException:
            slot.abandon()
            raise
        finally:
            with self._lock:
                self._running -= 1
                self._last_seconds = time.monotonic() - started
                self._changed.notify_all()
        self._ran(size)
