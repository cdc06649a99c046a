"""The micro-batcher: requests that several callers send at the same time run together.

A caller joins the batch that is open, or opens one. Who opened it leads: it waits for a slot, closes the batch, runs
it, and gives every caller its rows, while they sleep. Meanwhile the next batch fills. A caller that is alone waits for
nobody. Threads are kept only to lead batches that were opened by callers who do not wait.

Python's interpreter lock decides how fast this is: callers hold it as shortly, and let go of it as rarely as possible.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic

from mlflow_trt.core.arrays import Feeds, Outputs
from mlflow_trt.core.types import BatchAxis
from mlflow_trt.errors import OutOfMemoryError
from mlflow_trt.runtime.batching.host_copy import copies
from mlflow_trt.runtime.batching.sizes import BatchRows, Sizes, check_rows
from mlflow_trt.runtime.batching.slots import AnySlot, Slots


class Request:
    """The rows of one caller. Requests with the same `key` may run together; they have one profile and its sizes."""

    __slots__ = ("batch", "begun", "error", "feeds", "key", "no_room", "outputs", "profile", "rows", "sizes", "wake")

    def __init__(self, feeds: Feeds, rows: int, profile: int, sizes: Sizes, key: Hashable) -> None:
        self.feeds = feeds
        self.rows = rows
        self.profile = profile
        self.sizes = sizes
        self.key = key
        self.batch: Batch | None = None
        self.begun: float | None = None  # when its batch had been closed and had a slot, by time.monotonic
        self.no_room = ""  # for the whole batch: what was said
        self.outputs: Outputs | None = None
        self.error: Exception | None = None  # its own: nobody else was in the batch
        # Held until the outputs are there: a bare lock costs a tenth of an Event, and this is the hot path.
        self.wake = threading.Lock()
        self.wake.acquire()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for what comes of it."""
        return True

    def withdraw(self) -> None:
        """The batch has ended, whether there are outputs or not."""
        self.batch = None  # or its arrays would stay until Python looks for cycles
        self.wake.release()


class Batch:
    """Requests that run together. The methods want the lock, which is the batcher's."""

    __slots__ = ("_changed", "_lock", "requests", "rows")

    def __init__(self, lock: threading.Lock) -> None:
        self.rows = 0
        self.requests: list[Request] = []
        self._lock = lock
        self._changed: threading.Condition | None = None  # most leaders wait for nobody

    @property
    def leader(self) -> Request:
        return self.requests[0]

    def has_room(self, rows: int) -> bool:
        return self.rows + rows <= self.leader.sizes.largest

    def add(self, request: Request) -> None:
        request.batch = self
        self.rows += request.rows
        self.requests.append(request)

    def wait(self, seconds: float) -> None:
        """For a change. Only the leader waits: waking up threads that have nothing to do is what costs most here."""
        if self._changed is None:
            self._changed = threading.Condition(self._lock)
        self._changed.wait(seconds)

    def notify_leader(self) -> None:
        """The leader, if it waits, that something changed."""
        if self._changed is not None:
            self._changed.notify()


class MicroBatcher(Generic[AnySlot]):
    """Runs requests in the slots of a session.

    Args:
        slots: where batches run.
        axis: along which requests are put one after another; of inputs without it all requests of a key have the same.
        run_alone: runs one request by itself: what happens to each of a batch that failed, so that every caller gets
            its own result or its own error.
        shrink_batches: told the first request of a batch for which memory was lacking, but not for the request alone.
        ran: told the size of each batch.
        max_delay: seconds for which a batch stays open at most while another one runs.
    """

    def __init__(
        self,
        slots: Slots[AnySlot],
        axis: BatchAxis | None,
        run_alone: Callable[[Request], Outputs],
        shrink_batches: Callable[[Request, str], None],
        ran: Callable[[int], None],
        max_delay: float,
    ) -> None:
        self._slots = slots
        self._axis = axis
        self._run_alone = run_alone
        self._shrink_batches = shrink_batches
        self._ran = ran
        self._max_delay = max_delay
        self._lock = threading.Lock()
        self._open: dict[Hashable, Batch] = {}
        self._callers = 0  # in here
        self._usual_callers = 0.0  # of late
        self._running = 0  # of their requests
        self._joined = 0.0
        self._interval = 0.0  # seconds from one caller to the next, of late
        self._launched = 0.0
        self._seconds = math.inf  # that a run takes; not known yet
        self._batch_seconds = math.inf  # the same with the copies before it

    @property
    def expects_nobody(self) -> bool:
        """Whether callers have come one after the other of late."""
        return self._usual_callers < 1.5

    def run(self, request: Request) -> Outputs:
        """The outputs for the request's rows. Raises what running it alone raises."""
        try:
            batch = self.join(request)
            if batch.leader is not request:
                request.wake.acquire()
            else:
                self._lead(batch)
        finally:
            # Also where Ctrl-C came in between: others may have joined.
            led = request.batch
            if led is not None and led.leader is request:
                self._dissolve(led)
        return self.result(request)

    def lead(self, batch: Batch) -> None:
        """Run a batch for its leader, who does not wait for it."""
        try:
            self._lead(batch)
        finally:
            self._dissolve(batch)

    def result(self, request: Request) -> Outputs:
        """The outputs of a request whose batch has ended; where that failed, of running it alone.

        Raises what running it alone raises.
        """
        if request.outputs is not None:
            return request.outputs
        if request.error is not None:
            error, request.error = request.error, None
            try:
                raise error
            finally:
                del error  # which refers to this frame
        outputs = self._run_alone(request)
        if request.no_room:  # while there was some for one request: it was the size
            self._shrink_batches(request, request.no_room)
        return outputs

    def join(self, request: Request) -> Batch:
        """The batch that the request is in from now on. Who becomes its leader has it run."""
        now = time.monotonic()
        with self._lock:
            self._callers += 1
            self._interval += 0.2 * (min(now - self._joined, 1.0) - self._interval)
            self._joined = now
            batch = self._open.get(request.key)
            if batch is not None and batch.has_room(request.rows):
                batch.add(request)
                if not self._is_expecting(batch):
                    batch.notify_leader()
                return batch
            # Who comes from now on joins this one. One that is full runs as it is.
            full, batch = batch, Batch(self._lock)
            batch.add(request)
            self._open[request.key] = batch
            if full is not None:
                full.notify_leader()
        return batch

    def _lead(self, batch: Batch) -> None:
        try:
            self._run_batch(batch)
        except OutOfMemoryError as error:
            # There may be room for less than a batch, or for smaller pieces of a single request.
            if len(batch.requests) > 1:
                batch.leader.no_room = error.message
        except Exception as error:  # noqa: BLE001  # raised again by `result`
            if len(batch.requests) == 1:
                batch.leader.error = error

    def _run_batch(self, batch: Batch) -> None:
        first = batch.leader
        slot = self._slots.acquire()
        try:
            self._close(batch)
            begun = time.monotonic()
            try:
                requests = [request for request in batch.requests if request.is_wanted]
                if not requests:
                    return
                for request in requests:
                    request.begun = begun
                size = first.sizes.hold(sum(request.rows for request in requests))
                slot.launch(BatchRows([request.feeds for request in requests], self._axis, size), first.profile)
                launched = self._launched = time.monotonic()
                outputs = slot.finish()
                # The shortest of late: what goes beyond it was spent waiting for the interpreter lock.
                ended = time.monotonic()
                self._seconds = min(1.2 * self._seconds, ended - launched)
                self._batch_seconds = min(1.2 * self._batch_seconds, ended - begun)
                check_rows(outputs, size)
                _hand_out(outputs, requests)
            except BaseException:
                slot.abandon()
                raise
            finally:
                with self._lock:
                    self._running -= len(batch.requests)
            self._ran(size)
        finally:
            self._slots.release(slot)

    def _close(self, batch: Batch) -> None:
        """Wait for as many as usually come, but no longer than is worth it.

        That is until the batch before this one is half done, when it is time to send this one off for the GPU to find
        it ready; or, for who comes later than that, a quarter of a run. Nobody is worth waiting for where callers come
        further apart than a batch takes.
        """
        with self._lock:
            self._usual_callers = max(self._callers, 0.8 * self._usual_callers)
            if self._interval < self._batch_seconds and self._is_expecting(batch):
                now = time.monotonic()
                half_done = self._launched + self._seconds / 2 if self._running else 0.0
                until = min(now + self._max_delay, max(half_done, now + self._seconds / 4))
                while self._is_expecting(batch) and (left := until - time.monotonic()) > 0:
                    batch.wait(left)
            self._shut(batch)
            self._running += len(batch.requests)

    def _is_expecting(self, batch: Batch) -> bool:
        return len(batch.requests) < self._usual_callers - self._running and batch.has_room(1) and self._is_open(batch)

    def _is_open(self, batch: Batch) -> bool:
        return self._open.get(batch.leader.key) is batch

    def _shut(self, batch: Batch) -> None:
        if self._is_open(batch):
            del self._open[batch.leader.key]

    def _dissolve(self, batch: Batch) -> None:
        """Let everybody go, whether there are outputs or not."""
        with self._lock:
            self._shut(batch)
            self._callers -= len(batch.requests)
        for request in batch.requests:
            request.withdraw()


def _hand_out(outputs: Outputs, requests: Sequence[Request]) -> None:
    """Give every request a copy of its rows."""
    parts = []
    start = 0
    for request in requests:
        stop = start + request.rows
        parts += [output[start:stop] for output in outputs.values()]
        start = stop
    copied = iter(copies(parts))
    for request in requests:
        request.outputs = {name: next(copied) for name in outputs}
