"""Runs a batch that is cut into pieces: one slot is filled while the GPU works on another."""

from __future__ import annotations

import collections
from collections.abc import Callable

from mlflow_trt.core.arrays import take_rows
from mlflow_trt.core.types import BatchAxis
from mlflow_trt.runtime.batching.shared_work import Work
from mlflow_trt.runtime.batching.sizes import BatchRows, Piece, Sizes
from mlflow_trt.runtime.batching.slots import AnySlot, Slots


def run_pieces(
    work: Work,
    slots: Slots[AnySlot],
    axis: BatchAxis,
    usable_sizes: Callable[[], Sizes],
    count: Callable[[int], None],
) -> None:
    """Take pieces of `work` and run them until none is left; others may take part.

    `usable_sizes` is asked before each piece, since sizes become ready meanwhile; `count` is called with the size of
    each run. Raises what the runtime raises, after giving back what was not finished.
    """
    running: collections.deque[tuple[AnySlot, Piece]] = collections.deque()

    def finish_oldest() -> None:
        slot, piece = running[0]
        work.add(piece, slot.finish())
        running.popleft()
        slots.release(slot)
        count(piece.size)

    try:
        while work.is_left:
            slot = slots.acquire_now()
            while slot is None:
                # Never wait for a slot while holding one: two such callers would wait for each other.
                if running:
                    finish_oldest()
                    slot = slots.acquire_now()
                else:
                    slot = slots.acquire()
            piece = work.take(usable_sizes())
            if piece is None:  # another GPU was faster
                slots.release(slot)
                break
            running.append((slot, piece))
            rows = take_rows(work.feeds, axis, slice(piece.start, piece.stop))
            slot.launch(BatchRows([rows], axis, piece.size), work.profile)
        while running:
            finish_oldest()
    except BaseException:
        for slot, piece in reversed(running):
            slot.abandon()
            work.give_back(piece)
        raise
    finally:
        for slot, _ in running:
            slots.release(slot)
