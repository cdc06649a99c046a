"""Slots: the places in which a runtime runs batches, a few at a time, lent to one caller after another."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Generic, NoReturn, Protocol, TypeVar

from mlflow_trt.core.arrays import Outputs
from mlflow_trt.errors import SessionClosedError
from mlflow_trt.runtime.batching.sizes import BatchRows


class Slot(Protocol):
    """Memory for the inputs and outputs of one run, and what is needed to run it."""

    def launch(self, rows: BatchRows, profile: int) -> None:
        """Copy the inputs to where the runtime reads them, and start the run; where the runtime can, without waiting
        for its end. Nothing else runs in this slot.
        """

    def finish(self) -> Outputs:
        """Wait for the end. The arrays are the slot's own: the next `launch` overwrites them."""

    def abandon(self) -> None:
        """Wait until nothing reads or writes the slot's memory any more, after an error. Never raises."""

    def trim(self) -> None:
        """Free memory that the next, smaller batch may not need. Nothing runs in the slot."""

    def close(self) -> None:
        """Free everything."""


AnySlot = TypeVar("AnySlot", bound=Slot)


class Slots(Generic[AnySlot]):
    """Lends slots, first to who asked first; makes one when all are lent, up to `most`.

    `make` may raise: who asked gets the error, and the others go on with the slots there are.

    All of them together may be lent to somebody who runs batches in them by other means, until the next one asks.
    """

    def __init__(self, make: Callable[[], AnySlot], most: int) -> None:
        self._make = make
        self._most = most
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._line: collections.deque[threading.Condition] = collections.deque()
        self._free: list[AnySlot] = []
        self._made = 0
        self._closed = False
        self._several = threading.Lock()  # who holds some and waits for others, or two would wait for each other
        self._lent: list[AnySlot] = []
        self._recall: Callable[[], None] | None = None
        self._kept_here = 0  # how many want them not to be lent

    @property
    def are_lent(self) -> bool:
        return self._recall is not None

    @property
    def made(self) -> int:
        """How many there are."""
        return self._made

    def lend(self, hand_over: Callable[[Sequence[AnySlot]], None], recall: Callable[[], None]) -> bool:
        """Lend all slots, after those who asked before, unless they are lent already.

        False where there are none, or somebody wants them kept here. `hand_over` is told the slots. `recall` is called
        by who asks next, and returns when nobody uses them any more: a function in C, which Ctrl-C cannot cut short.
        Raises SessionClosedError after `close`.
        """
        if self._recall is not None:
            return True
        with self._lock:
            self._check_open()
            if self._kept_here:
                return False
            if self._line or not self._can_lend():
                self._wait_in_line(self._can_lend)
            if self._recall is None and not self._kept_here and self._free:
                hand_over(self._free)
                self._lent, self._free, self._recall = self._free, [], recall
            self._wake()
            return self._recall is not None

    def keep_here(self) -> None:
        """Lend nothing until `let_go`: who would have lent them had better do as all others."""
        with self._lock:
            self._kept_here += 1
            try:
                self._take_back()
                self._wake()
            except BaseException:
                self._kept_here -= 1
                raise

    def let_go(self) -> None:
        with self._lock:
            self._kept_here -= 1

    @contextmanager
    def kept_here(self) -> Iterator[None]:
        """A block in which nothing is lent."""
        self.keep_here()
        try:
            yield
        finally:
            self.let_go()

    def acquire(self) -> AnySlot:
        """A slot, after those who asked before. Raises SessionClosedError after `close`."""
        with self._lock:
            self._check_open()
            if self._line or not self._available():
                self._wait_in_line(self._available)
            slot = self._take()
        return self._new() if slot is None else slot

    def acquire_now(self) -> AnySlot | None:
        """A slot, or None where one would have to wait. Raises SessionClosedError after `close`."""
        with self._lock:
            self._check_open()
            if self._line or not self._available():
                return None
            slot = self._take()
        return self._new() if slot is None else slot

    def trim(self) -> None:
        """Let the slots that nobody uses free what they need not keep."""
        with self._lock:
            self._take_back()
            idle, self._free = self._free, []
        with ExitStack() as stack:  # all of them come back, whatever one of them raises
            for slot in idle:
                stack.callback(self.release, slot)
                stack.callback(slot.trim)

    def release(self, slot: AnySlot) -> None:
        with self._lock:
            # The one used last comes first: its memory and its execution contexts are the ones that exist.
            self._free.append(slot)
            self._wake()

    @contextmanager
    def borrow(self) -> Iterator[AnySlot]:
        """A slot for the length of a block."""
        slot = self.acquire()
        try:
            yield slot
        except BaseException:
            slot.abandon()
            raise
        finally:
            self.release(slot)

    @contextmanager
    def borrow_several(self, count: int) -> Iterator[list[AnySlot]]:
        """So many slots at the same time. Nothing is lent meanwhile, or who wants to lend all would be waited for."""
        with self._several, self.kept_here(), ExitStack() as stack:
            yield [stack.enter_context(self.borrow()) for _ in range(count)]

    def close(self) -> None:
        """Refuse new callers, wait for every lent slot, and close them all. Raises what closing one of them raises."""
        with self._lock:
            self._closed = True
            self._take_back()
            for place in self._line:
                place.notify()
            while len(self._free) < self._made:
                self._returned.wait()
            free, self._free, self._made = self._free, [], 0
            self._make = _refuse  # lets go of what the slots were made from
        with ExitStack() as stack:  # all of them, whatever one of them raises
            for slot in free:
                stack.callback(slot.close)

    def _take(self) -> AnySlot | None:
        """One that is free; None for who is to make one, which is counted already."""
        self._take_back()
        if self._free:
            return self._free.pop()
        self._made += 1
        return None

    def _new(self) -> AnySlot:
        # Outside of the lock: it takes its time, and others may go on with the slots there are.
        try:
            return self._make()
        except BaseException:
            with self._lock:
                self._made -= 1
                self._wake()
            raise

    def _wait_in_line(self, is_ready: Callable[[], bool]) -> None:
        place = threading.Condition(self._lock)
        self._line.append(place)
        try:
            while self._line[0] is not place or not is_ready():
                place.wait()
                self._check_open()
        finally:
            self._line.remove(place)
            self._wake()  # it may not have wanted what there is

    def _wake(self) -> None:
        if self._line:
            self._line[0].notify()
        if self._closed:
            self._returned.notify_all()

    def _available(self) -> bool:
        return bool(self._free) or self._made < self._most or self._recall is not None

    def _can_lend(self) -> bool:
        """Or it is settled that nothing will be."""
        return len(self._free) == self._made or self._recall is not None or self._kept_here > 0

    def _take_back(self) -> None:
        if self._recall is None:
            return
        try:
            self._recall()
        finally:
            self._free += self._lent
            self._lent, self._recall = [], None

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError


def _refuse() -> NoReturn:
    raise SessionClosedError
